"""Run arcface_torch's trainer as often as a recipe takes it."""

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from arcface_kd.errors import ArcfaceKDError, ConfigError
from arcface_kd.methods.recipe import Recipe, Stage, all_done, recipe_of

# torchrun gives its ranks 30 before it kills them.
_SECONDS_TO_END = 40.0


def run_in_host(folder: Path, words: Sequence[str], settings: Callable[[], dict[str, Any]]) -> list[str]:
    """Run arcface_torch's trainer as often as a recipe takes it; the titles of the runs.

    ``settings`` gives the merged config, to see which run is next. After a failed run the same command goes on from
    where it stood.
    """
    made: list[str] = []
    while (stage := _next_in_host(folder, settings)) is not None:
        if made and made[-1] == stage.title:
            raise ArcfaceKDError(f"{stage} has ended without its last epoch; look at what the trainer has printed")
        if _ended([sys.executable, "-m", "torch.distributed.run", *words[1:]], folder) != 0:
            raise ArcfaceKDError(f"{stage} has failed, see above; the same command goes on from its last checkpoint")
        made.append(stage.title)
    if not made:
        raise all_done(settings())
    return made


def _ended(words: Sequence[str], folder: Path) -> int:
    """Run a launcher to its end; its exit code.

    Interrupted, it is waited for, and asked to end where nobody else has: killed, as ``subprocess.run`` does it, it
    would leave its ranks training.
    """
    with subprocess.Popen(words, cwd=folder) as launcher:
        try:
            return launcher.wait()
        except BaseException:
            # A terminal interrupts both; asked twice, it would leave off ending its ranks.
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(_SECONDS_TO_END)
            launcher.terminate()
            raise


def command(config: str, flags: Sequence[str], ranks: int = 1, launch: Sequence[str] = ()) -> list[str]:
    """The words that start one run in arcface_torch's folder; each start makes the run that is next."""
    return ["torchrun", f"--nproc_per_node={ranks}", *launch, "train_v2.py", config, *flags]


def shell_line(folder: Path, words: Sequence[str]) -> str:
    """A command as one types it."""
    return f"cd {shlex.quote(str(folder))} && {shlex.join(words)}"


def _next_in_host(folder: Path, settings: Callable[[], dict[str, Any]]) -> Stage | None:
    config = settings()
    with _working_in(folder):
        return recipe_in_host(config).next_run(config)


def recipe_in_host(config: Mapping[str, Any]) -> type[Recipe]:
    """The recipe that a config asks for, refused where it asks for none."""
    recipe = recipe_of(config)
    if recipe is None:
        raise ConfigError(f"kd is {config.get('kd')!r}, which is one run: start it with torchrun, as any other")
    return recipe


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """The trainer's paths are relative to its own folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
