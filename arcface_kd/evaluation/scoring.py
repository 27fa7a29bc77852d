"""``arcface-kd eval``: any models on verification sets and IJB sets, as a table and as JSON."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from arcface_kd.backbones import OWN
from arcface_kd.data.formats.ijb import IJBSet, is_ijb, read_ijb
from arcface_kd.data.formats.verification_bin import VerificationSet, decode, list_bins
from arcface_kd.errors import ConfigError, DataError
from arcface_kd.evaluation.embedding import embed
from arcface_kd.evaluation.templates import evaluate_ijb
from arcface_kd.evaluation.verification import read_pairs, verify
from arcface_kd.system.device import default_device
from arcface_kd.system.files import atomic_write, require_folder_of
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.checkpoint import is_run_folder, own_network_in_log
from arcface_kd.teachers.options import TeacherOptions

_TITLES = {
    "pairs": "verification of pairs, ten folds, in %",
    "1:1": "verification of templates, in %",
    "1:N": "identification of templates, in %",
}


@dataclass(frozen=True)
class Score:
    """One model on one set by one protocol.

    Attributes:
        model: as it was named.
        set: the verification set's name, or the IJB set's.
        protocol: ``pairs`` for verification sets, ``1:1`` and ``1:N`` for IJB's.
        input: how the model's input was prepared.
        numbers: by name; shares in [0, 1], ``None`` where the set is too small to tell.
    """

    model: str
    set: str
    protocol: str
    input: str
    numbers: Mapping[str, int | float | None]

    def as_row(self) -> dict[str, str | int | float | None]:
        """For ``json.dumps``."""
        return {
            "set": self.set,
            "model": self.model,
            "protocol": self.protocol,
            "input": self.input,
            **self.numbers,
        }


def load_models(
    sources: Sequence[str], options: Mapping[str, object] | None = None, *, device: torch.device | None = None
) -> dict[str, Teacher]:
    """Load models to judge, all of them before the first is asked.

    Args:
        sources: run folders, or anything that :func:`arcface_kd.teachers.base.load_teacher` takes.
        options: ``teacher.*`` options for those that are no run folders; what a run trains sees RGB as
            (x - 127.5) / 127.5 and nothing else. A ``network`` of the user's own is also that of the run folders whose
            log names it or that have no log.
        device: where they compute.

    Returns:
        The models by the names that were given.

    Raises:
        TeacherError: one that cannot be loaded.
        ConfigError: a name given twice, an option that is unknown or that no model is there for.
    """
    twice = next((source for place, source in enumerate(sources) if source in sources[:place]), None)
    if twice is not None:
        raise ConfigError(f"{twice} is given twice; name each model once")
    checked = TeacherOptions.of(options)
    own = checked.network if checked.network and checked.network.startswith(OWN) else None
    runs = {source: own is not None and _may_be(own, source) for source in sources if is_run_folder(source)}
    if checked != TeacherOptions(network=own if any(runs.values()) else None) and len(runs) == len(sources):
        raise ConfigError(
            f"teacher options were given, but {', '.join(sources)} is what this trainer trained, which takes RGB as "
            "(x - 127.5) / 127.5; leave the options out"
        )
    # Models are judged in full precision, also where a run's teacher would compute in fp16.
    exact = replace(checked, precision=checked.precision or "fp32")
    trained = TeacherOptions(precision="fp32")
    named = replace(trained, network=own)
    return {
        source: load_teacher(source, (named if runs[source] else trained) if source in runs else exact, device=device)
        for source in sources
    }


def _may_be(own: str, source: str) -> bool:
    """Whether a run folder's log names this network, or says nothing."""
    folder = Path(source).expanduser()
    return own_network_in_log(folder) == own or not (folder / "training.log").is_file()


def find_sets(folders: Sequence[str | os.PathLike[str]]) -> list[VerificationSet | IJBSet]:
    """Read all sets of some folders; of an IJB set only its lists.

    Args:
        folders: with ``.bin`` files, or with ``meta`` and ``loose_crop`` as InsightFace lays IJB out; a ``.bin`` file
            stands for itself.

    Returns:
        The sets, in the order of the folders, those of a folder by name.

    Raises:
        DataError: a folder without any, a set that cannot be read, or one without ten pairs of both kinds.
    """
    found: list[VerificationSet | IJBSet] = []
    for folder in map(Path, folders):
        bins = [folder] if folder.is_file() else list_bins(folder)
        if not bins and not is_ijb(folder):
            met = "holds no set" if folder.is_dir() else "is no folder"
            raise DataError(
                f"{folder} {met}; wanted verification sets (*.bin), or IJB as InsightFace lays it out "
                "(meta/*_face_tid_mid.txt, loose_crop/)"
            )
        found += map(read_pairs, bins)
        if is_ijb(folder):
            found.append(read_ijb(folder))
    return found


def score(
    models: Mapping[str, Teacher],
    sets: Sequence[VerificationSet | IJBSet],
    *,
    batch_size: int = 128,
    device: torch.device | None = None,
    progress: bool = False,
) -> Iterator[Score]:
    """Judge models, set by set.

    Args:
        models: by name.
        sets: what to judge them on.
        batch_size: images a forward pass, at least 1.
        device: where the batches go; None for where a model's weights are.
        progress: show bars, on a terminal only.

    Yields:
        Scores as they come.

    Raises:
        DataError: an image that cannot be read, a model that embeds NaN; the message names the model.
    """
    for one in sets:
        images = decode(one) if isinstance(one, VerificationSet) else None
        for name, model in models.items():
            try:
                if isinstance(one, IJBSet):
                    judged = evaluate_ijb(model, one, batch_size=batch_size, device=device, progress=progress)
                    rows: Mapping[str, Mapping[str, int | float | None]] = judged.as_rows()
                else:
                    assert images is not None
                    embeddings = embed(
                        model, images, batch_size=batch_size, device=device, dtype=np.float64, progress=progress
                    )
                    rows = {"pairs": verify(embeddings, one.is_same).as_row()}
            except DataError as error:
                raise DataError(f"{name} on {one.name}: {error}") from None
            for protocol, numbers in rows.items():
                yield Score(name, one.name, protocol, str(model.preprocessing), numbers)


def heading(name: str) -> str:
    """A number's name on top of its column: ``TAR@FAR=1e-3``, ``EER``, ``genuine pairs``.

    Args:
        name: as JSON has it: ``tar@far=1e-3``.
    """
    rate, at, point = name.partition("@")
    if at:
        kind, _, level = point.partition("=")
        return f"{rate.upper()}@{kind.upper()}={level}"
    return name.upper() if name in ("auc", "eer") else name.replace("_", " ")


def _cell(name: str, numbers: Mapping[str, int | float | None]) -> str:
    value = numbers[name]
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    deviation = numbers.get(f"{name}_std")
    return f"{100 * value:.3f}" if deviation is None else f"{100 * value:.3f} +- {100 * deviation:.3f}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of a table in columns, for a terminal.

    Args:
        lines: as many cells each.

    Returns:
        The text, without a final newline.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(map(str.rstrip, rows))


def table(scores: Sequence[Score]) -> str:
    """Scores for a terminal, a block of aligned lines for each protocol.

    Args:
        scores: of :func:`score`.

    Returns:
        Lines without a final newline. A column that no set is large enough for is left out, as is that of the inputs
        where all are the same.
    """
    blocks = []
    several_inputs = len({one.input for one in scores}) > 1
    for protocol, title in _TITLES.items():
        chosen = [one for one in scores if one.protocol == protocol]
        if not chosen:
            continue
        names = [
            name
            for name in chosen[0].numbers
            if not name.endswith("_std") and any(one.numbers[name] is not None for one in chosen)
        ]
        lines = [["set", "model", *map(heading, names), "input"]]
        lines += [[one.set, one.model, *(_cell(name, one.numbers) for name in names), one.input] for one in chosen]
        if not several_inputs:
            lines = [line[:-1] for line in lines]
        blocks.append(f"{title}\n{aligned(lines)}")
    return "\n\n".join(blocks)


def write_json(path: str | os.PathLike[str], scores: Sequence[Score]) -> None:
    """Write scores as a JSON list with one object for each model, set and protocol.

    Args:
        path: the file; its folder must exist.
        scores: of :func:`score`.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_write(path) as stream:
        stream.write((json.dumps([one.as_row() for one in scores], indent=2, allow_nan=False) + "\n").encode())


def run_eval(
    sources: Sequence[str],
    folders: Sequence[str | os.PathLike[str]],
    options: Mapping[str, object] | None = None,
    *,
    out: Path | None = None,
    batch_size: int = 128,
) -> list[Score]:
    """Judge models, print the table, write the JSON file; after an error, the table of what was judged before it.

    Args:
        sources: the models, see :func:`load_models`.
        folders: the sets, see :func:`find_sets`.
        options: ``teacher.*`` options.
        out: JSON file; None writes none.
        batch_size: images a forward pass, at least 1.

    Returns:
        The scores.

    Raises:
        ConfigError: an option that cannot be, or a folder that ``out`` cannot be written to.
        TeacherError: a model that cannot be loaded.
        DataError: a set that cannot be read, or a model that embeds NaN.
    """
    # Hours of IJB-C must not end in a missing folder.
    if out is not None:
        require_folder_of(out)
    device = default_device()
    sets = find_sets(folders)
    models = load_models(sources, options, device=device)
    scores: list[Score] = []
    try:
        scores.extend(score(models, sets, batch_size=batch_size, device=device, progress=True))
    finally:
        # Also what was judged before a file that cannot be read, or before somebody lost patience.
        if scores:
            print(table(scores), flush=True)
    if out is not None:
        write_json(out, scores)
        print(f"\n{out}: {len(scores)} rows")
    return scores
