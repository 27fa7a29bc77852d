"""Commands for arcface_torch's own trainer: ``patch``, ``recipe``, ``merge-head`` and ``methods``."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from arcface_kd.cli.command import Commands, add_config
from arcface_kd.cli.train import train
from arcface_kd.config.flags import add_arguments
from arcface_kd.errors import ConfigError


def add_commands(commands: Commands) -> None:
    """Add the family."""
    patch = commands.add(
        "patch",
        _patch,
        "add --kd to a checkout of arcface_torch, or other patches: kd_flag, current_stack, cpu_gloo",
        "arcface-kd patch insightface/recognition/arcface_torch",
    )
    patch.add_argument("folder", type=Path, help="arcface_torch, or a checkout of insightface")
    patch.add_argument("names", nargs="*", help="which patches (default: kd_flag and what this torch and numpy need)")
    patch.add_argument("--check", action="store_true", help="say what would happen and write nothing")
    patch.add_argument("--revert", action="store_true", help="take the patches out again, byte for byte")

    recipe = commands.add(
        "recipe",
        _recipe,
        "make all runs of a method that takes several (shkd: three), in arcface_torch or in the compact trainer",
        "arcface-kd recipe insightface/recognition/arcface_torch configs/ms1mv2_mbf_shkd --nproc 8",
    )
    recipe.add_argument(
        "folder", type=Path, nargs="?", help="arcface_torch, which all paths are then seen from; none: compact trainer"
    )
    add_config(recipe)
    host = recipe.add_argument_group("in arcface_torch", "--kd flags need the patched trainer")
    host.add_argument("--nproc", metavar="N", type=int, help="processes on this machine (default: 1)")
    host.add_argument(
        "--torchrun", metavar="WORDS", type=shlex.split, help='its further options: --torchrun="--nnodes=2 ..."'
    )
    host.add_argument("--print", action="store_true", help="print the command of one run and start nothing")
    add_arguments(recipe)

    merge = commands.add(
        "merge-head",
        _merge_head,
        "join the class centers that the ranks of a run have saved, ours or arcface_torch's, into one file",
        "arcface-kd merge-head work_dirs/ms1mv2_mbf_adadistill head.pt",
    )
    merge.add_argument("run_folder", metavar="RUN", type=Path, help="the run's output, with checkpoint_gpu_*.pt")
    merge.add_argument("out", metavar="OUT", type=Path, help='the file: {"weight": (C, D), "num_classes": C}')

    methods = commands.add(
        "methods",
        _methods,
        "list the installed methods, or say which to take for the images at hand",
        "arcface-kd methods --data faces_emore",
    )
    methods.add_argument("--data", metavar="DIR", nargs="+", help="what a config's rec may be")


def _patch(arguments: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from arcface_kd.host.patching import NEEDED, available_patches, patch_checkout

    names = arguments.names or (available_patches() if arguments.revert else NEEDED)
    for outcome in patch_checkout(arguments.folder, names, check=arguments.check, revert=arguments.revert):
        print(outcome)
    if not arguments.names and not arguments.revert:
        print(
            f"current_stack is for torch {torch.__version__}, whose schedules have no `verbose`, and numpy "
            f"{np.__version__}, which does not go with mxnet; without it: arcface-kd patch DIR kd_flag"
        )
        if not torch.cuda.is_available():
            print("there is no GPU here: cpu_gloo lets the trainer run on a CPU, for rehearsals")


def _recipe(arguments: argparse.Namespace) -> None:
    if arguments.folder is not None:
        _recipe_in_host(arguments, arguments.folder)
    elif arguments.nproc or arguments.torchrun or arguments.print:
        raise ConfigError(
            "--nproc, --torchrun and --print are for arcface_torch: give its folder before the config; the compact "
            "trainer runs on several GPUs under `torchrun --nproc_per_node=8 -m arcface_kd recipe CONFIG`"
        )
    else:
        train(arguments)


def _recipe_in_host(arguments: argparse.Namespace, folder: Path) -> None:
    from arcface_kd.config.arcface_torch import load_config
    from arcface_kd.config.flags import flags_of, merge_arguments
    from arcface_kd.host.recipe import command, recipe_in_host, run_in_host, shell_line

    if arguments.set:
        raise ConfigError("--set is for the compact trainer: arcface_torch takes its keys from the config alone")
    if not (folder / "train_v2.py").is_file():
        raise ConfigError(f"{folder} has no train_v2.py; wanted insightface's recognition/arcface_torch")
    name = f"configs/{Path(arguments.config).stem}"
    words = command(name, flags_of(arguments), arguments.nproc or 1, arguments.torchrun or [])

    def settings() -> dict[str, object]:
        config = load_config(str(folder / f"{name}.py"))
        merge_arguments(config, arguments)
        return dict(config)

    if arguments.print:
        runs = recipe_in_host(settings()).runs
        print(f"# {runs} times: each makes the run that is next, or resumes it\n{shell_line(folder, words)}")
        return
    run_in_host(folder, words, settings)


def _merge_head(arguments: argparse.Namespace) -> None:
    from arcface_kd.checkpoints.shards import merge_head

    classes, dimension = merge_head(arguments.run_folder, arguments.out)
    print(f"{arguments.out}: {classes} class centers of {dimension} dimensions")


def _methods(arguments: argparse.Namespace) -> None:
    from arcface_kd import registry

    if arguments.data:
        _choose(arguments.data)
        return
    for name in registry.entry_points(registry.METHODS):
        try:
            method: Any = registry.load(registry.METHODS, name)
            if not hasattr(method, "requires"):
                raise ConfigError(f"its entry point is {method!r}; it must be a subclass of Method")
        except ConfigError as error:
            print(f"{name:20} {' '.join(str(error).split())}")
            continue
        summary = (method.__doc__ or f"{method.__module__}.{method.__name__}.").strip().splitlines()[0]
        needs = sorted(requirement.name.lower().replace("_", " ") for requirement in method.requires)
        print(f"{name:20} {summary} Needs: {', '.join(needs) or 'nothing'}.")


def _choose(folders: list[str]) -> None:
    from arcface_kd.data.joined import open_rec
    from arcface_kd.methods.choice import Records, choices_for

    records = Records.of(open_rec(folders[0] if len(folders) == 1 else folders).labels())
    print(f"{', '.join(folders)}: {records}")
    for choice in choices_for(records):
        print(f"{choice.have}: {choice.take}\n    {choice.why}")
