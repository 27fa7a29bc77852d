"""Commands that train: ``train``, ``cache`` and ``demo``."""

import argparse
import os
from pathlib import Path
from typing import Any, get_args

from arcface_kd.cli.command import Commands, add_config, settings_of
from arcface_kd.config.flags import add_arguments, merge_arguments, refuse_flags_without_method
from arcface_kd.config.kd import How


def add_commands(commands: Commands) -> None:
    """Add the family."""
    training = commands.add(
        "train",
        train,
        "train a student from an arcface_torch config, on a CPU, a GPU or many under torchrun",
        "arcface-kd train configs/ms1mv2_mbf_adadistill.py --kd-teacher r50.pt --set batch_size=64",
    )
    add_config(training)
    add_arguments(training)

    cache = commands.add(
        "cache",
        _cache,
        "embed all training images beforehand, so that no run asks the teacher again (11.9 GB for MS1MV2)",
        "arcface-kd cache configs/ms1mv2_mbf_adadistill.py --kd-teacher r50.pt --out /train_tmp/r50.cache",
    )
    add_config(cache)
    cache.add_argument("--out", metavar="FILE", help="the cache (default: the config's kd_cache)")
    add_arguments(cache)

    merge = commands.add(
        "cache merge",
        _merge_caches,
        "make one teacher of several: a cache of their caches over the same images",
        "arcface-kd cache merge r50.cache vit_b.cache --how pca --out both.cache",
    )
    merge.add_argument("caches", metavar="CACHE", nargs="+", help="full caches, each of another teacher")
    merge.add_argument(
        "--how",
        choices=get_args(How),
        default="concat",
        help="embeddings side by side (concat, default), their mean, or their principal axes, as many as the largest "
        "teacher has dimensions (pca)",
    )
    merge.add_argument("--out", metavar="FILE", required=True, help="the new cache")

    demo = commands.add(
        "demo",
        _demo,
        "the whole job in minutes: data, teacher, student alone, student distilled, a table and pictures",
        "arcface-kd demo --data faces --kd-teacher teacher.onnx --kd-option teacher.channels=bgr --seeds 3",
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything it writes (default: demo)")
    demo.add_argument("--data", type=Path, help="a folder with train.rec and .bin sets instead of the drawn faces")
    demo.add_argument("--seeds", type=int, default=1, help="train each student this often and give means (default: 1)")
    demo.add_argument("--epochs", type=int, help="epochs of the students (default: chosen for the data)")
    demo.add_argument(
        "--network", default="thin_r10", help="the students', such as mbf:width=1,se=true (default: thin_r10)"
    )
    add_arguments(demo)


def train(arguments: argparse.Namespace) -> None:
    """Train with the compact trainer, all runs where the config asks for several."""
    from arcface_kd.config.arcface_torch import load_config
    from arcface_kd.training.stages import train_stages

    config = load_config(arguments.config, settings_of(arguments))
    merge_arguments(config, arguments)
    refuse_flags_without_method(config, arguments)
    first = os.environ.get("RANK", "0") == "0"
    result = train_stages(config, print if first else None)
    if not first:
        return
    for name, verification in result.verification.items():
        print(f"{name}: accuracy {verification.accuracy:.5f} +- {verification.accuracy_std:.5f}")
    print(f"{result.output / 'model.pt'}: {result.steps} steps, {result.images_per_second:.0f} images/s")


def _cache(arguments: argparse.Namespace) -> None:
    from arcface_kd.config.arcface_torch import load_config
    from arcface_kd.teachers.cache.fill import fill_cache

    config = load_config(arguments.config, settings_of(arguments))
    merge_arguments(config, arguments)
    if arguments.out is not None:
        config.kd_cache = arguments.out
    report = fill_cache(config)
    if int(os.environ.get("RANK", "0")) == 0:
        print(report)


def _merge_caches(arguments: argparse.Namespace) -> None:
    from arcface_kd.teachers.cache.merge import merge_caches

    print(merge_caches(arguments.caches, arguments.how, arguments.out))


def _demo(arguments: argparse.Namespace) -> None:
    from arcface_kd.demo import DemoSettings, run_demo

    keys: dict[str, Any] = {}
    merge_arguments(keys, arguments)
    run_demo(
        DemoSettings(
            out=arguments.out,
            data=arguments.data,
            keys=keys,
            seeds=arguments.seeds,
            epochs=arguments.epochs,
            network=arguments.network,
        )
    )
