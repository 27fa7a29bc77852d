"""The command line: ``arcface-kd COMMAND``. Bad input ends in one line and exit code 2."""

import argparse
import contextlib
import faulthandler
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arcface_kd.errors import ArcfaceKDError, ConfigError, RankError
from arcface_kd.system.console import flush_or_stop, stop_printing

Command = Callable[[argparse.Namespace], None]

# What a shell says of a command that SIGPIPE has ended.
_NOBODY_READS = 141

_LONGEST_MESSAGE = 4000
# Modules of the packages that an installation of this one brings along, itself or through insightface.
_BROUGHT_ALONG = frozenset(
    ("cv2", "easydict", "insightface", "numpy", "onnx", "onnxruntime", "PIL", "tensorboard", "torch", "tqdm", "unidiff")
)


def _train(arguments: argparse.Namespace) -> None:
    from arcface_kd.config.arcface_torch import load_config
    from arcface_kd.config.flags import merge_arguments, refuse_flags_without_method
    from arcface_kd.methods.shkd.stages import wants_stages
    from arcface_kd.training.stages import train_stages
    from arcface_kd.training.trainer import train

    config = load_config(arguments.config, _settings(arguments.set))
    merge_arguments(config, arguments)
    refuse_flags_without_method(config, arguments)
    first = os.environ.get("RANK", "0") == "0"
    result = train_stages(config, print if first else None) if wants_stages(config) else train(config)
    for name, verification in result.verification.items():
        print(f"{name}: accuracy {verification.accuracy:.5f} +- {verification.accuracy_std:.5f}")
    print(f"{result.output / 'model.pt'}: {result.steps} steps, {result.images_per_second:.0f} images/s")


def _cache(arguments: argparse.Namespace) -> None:
    from arcface_kd.config.arcface_torch import load_config
    from arcface_kd.config.flags import merge_arguments
    from arcface_kd.teachers.cache.fill import fill_cache

    config = load_config(arguments.config, _settings(arguments.set))
    merge_arguments(config, arguments)
    if arguments.out is not None:
        config.kd_cache = arguments.out
    report = fill_cache(config)
    if int(os.environ.get("RANK", "0")) == 0:
        print(report)


def _recipe(arguments: argparse.Namespace) -> None:
    from arcface_kd.config.arcface_torch import load_config
    from arcface_kd.config.flags import flags_of, merge_arguments
    from arcface_kd.host.recipe import command, run_in_host, shell_line
    from arcface_kd.methods.shkd.stages import MOST_RUNS

    folder: Path = arguments.folder
    if not (folder / "train_v2.py").is_file():
        raise ConfigError(f"{folder} has no train_v2.py; wanted insightface's recognition/arcface_torch")
    name = f"configs/{Path(arguments.config).stem}"
    flags = flags_of(arguments)

    def settings() -> dict[str, object]:
        config = load_config(str(folder / f"{name}.py"))
        merge_arguments(config, arguments)
        return dict(config)

    if arguments.print:
        line = shell_line(folder, command(name, flags, arguments.nproc, arguments.torchrun))
        print(f"# {MOST_RUNS} times: each makes the run that is next, and goes on where it was interrupted\n{line}")
        return
    run_in_host(folder, name, flags, settings, arguments.nproc, arguments.torchrun)


def _settings(pairs: Sequence[str]) -> dict[str, object]:
    settings: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair!r} has no value; write --set {key}=VALUE")
        settings[key] = value
    return settings


def _demo(arguments: argparse.Namespace) -> None:
    from arcface_kd.demo import DemoSettings, run_demo

    run_demo(
        DemoSettings(
            out=arguments.out,
            data=arguments.data,
            teacher=arguments.kd_teacher,
            options=arguments.kd_option or [],
            method=arguments.kd or "adadistill",
            classifier=arguments.kd_classifier,
            cache=None if arguments.kd_cache is None else Path(arguments.kd_cache),
            on_bad_record=arguments.kd_on_bad_record or "stop",
            seeds=arguments.seeds,
            epochs=arguments.epochs,
        )
    )


def _patch(arguments: argparse.Namespace) -> None:
    from arcface_kd.host.patching import patch_checkout

    for outcome in patch_checkout(arguments.folder, arguments.names, check=arguments.check, revert=arguments.revert):
        print(outcome)


def _check(arguments: argparse.Namespace) -> None:
    from arcface_kd.data.formats.verification_bin import read_bin
    from arcface_kd.evaluation.teacher_check import check_teacher
    from arcface_kd.teachers.base import load_teacher

    options = _teacher_options(arguments)
    pairs = None if arguments.bin is None else read_bin(arguments.bin)
    print(check_teacher(load_teacher(arguments.kd_teacher, options), pairs))


def _compare(arguments: argparse.Namespace) -> None:
    from arcface_kd.evaluation.report.comparison import (
        Contestant,
        compare,
        data_of,
        read_runs,
        run_contestant,
        verification_files,
    )
    from arcface_kd.evaluation.report.page import write_report
    from arcface_kd.evaluation.report.pictures import require_matplotlib
    from arcface_kd.system.device import training_device
    from arcface_kd.teachers.base import load_teacher

    require_matplotlib()
    options = _teacher_options(arguments)
    if arguments.kd_teacher is None and options:
        raise ConfigError("teacher options were given without a teacher; add --kd-teacher FILE")
    runs = read_runs(arguments.runs)
    files = verification_files(arguments.data if arguments.data is not None else data_of(runs))
    device = training_device()
    models = [run_contestant(run, device) for run in runs]
    if arguments.kd_teacher is not None:
        teacher = load_teacher(arguments.kd_teacher, options, device=device)
        models.append(
            Contestant("teacher", lambda: teacher, "teacher", teacher.description, parameters=teacher.parameter_count)
        )
    compared = compare(models, files, device, progress=True)
    for path in write_report(compared, arguments.out, faces=not arguments.no_faces):
        print(path)


def _eval(arguments: argparse.Namespace) -> None:
    from arcface_kd.evaluation.scoring import run_eval

    options = _teacher_options(arguments)
    run_eval(arguments.models, arguments.data, options, out=arguments.out, batch_size=arguments.batch_size)


def _export(arguments: argparse.Namespace) -> None:
    from arcface_kd.export.onnx import export

    print(
        export(
            arguments.run_folder,
            arguments.out,
            int8=arguments.int8,
            calibration=arguments.calibration,
            images=arguments.images,
        )
    )


def _teacher_options(arguments: argparse.Namespace) -> Mapping[str, object] | None:
    """The ``teacher.*`` options, for commands that have a use for no others."""
    from arcface_kd.config.kd import KDConfig

    options = KDConfig.from_config({"kd_option": arguments.kd_option}).options
    foreign = [f"{prefix}.{name}" for prefix, values in options.items() if prefix != "teacher" for name in values]
    if foreign:
        raise ConfigError(f"option {foreign[0]} has no meaning here; options start with teacher.")
    return options.get("teacher")


def _merge_head(arguments: argparse.Namespace) -> None:
    from arcface_kd.checkpoints.shards import merge_head

    classes, dimension = merge_head(arguments.run_folder, arguments.out)
    print(f"{arguments.out}: {classes} class centers of {dimension} dimensions")


def _pack(arguments: argparse.Namespace) -> None:
    from arcface_kd.data.pack import pack_folder

    print(pack_folder(arguments.folder, arguments.out))


def _subset(arguments: argparse.Namespace) -> None:
    from arcface_kd.data.subset import write_subset

    per_identity, seed = arguments.images_per_identity, arguments.seed
    print(write_subset(arguments.folder, arguments.out, images_per_identity=per_identity, seed=seed))


def _methods(arguments: argparse.Namespace) -> None:
    from arcface_kd import registry

    for name in registry.entry_points(registry.METHODS):
        try:
            method: Any = registry.load(registry.METHODS, name)
        except ConfigError as error:
            print(f"{name:20} {' '.join(str(error).split())}")
            continue
        summary = (method.__doc__ or f"{method.__module__}.{method.__name__}.").strip().splitlines()[0]
        needs = sorted(requirement.name.lower().replace("_", " ") for requirement in method.requires)
        print(f"{name:20} {summary} Needs: {', '.join(needs) or 'nothing'}.")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from arcface_kd.config.flags import add_arguments

    parser = argparse.ArgumentParser(
        prog="arcface-kd",
        description="Knowledge distillation for face recognition, beside InsightFace's arcface_torch.",
        epilog="example: arcface-kd demo; each command has an example of its own: arcface-kd COMMAND --help",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Command, summary: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example: {example}",
        )
        made.set_defaults(run=run)
        return made

    train = command(
        "train",
        _train,
        "train a student from an arcface_torch config, on a CPU, a GPU or many under torchrun",
        "arcface-kd train configs/ms1mv2_mbf_adadistill.py --kd-teacher r50.pt --set batch_size=64",
    )
    train.add_argument("config", help="an arcface_torch config, by path or by name in configs/; it is run as Python")
    train.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="values over those of the config"
    )
    add_arguments(train)

    cache = command(
        "cache",
        _cache,
        "embed all training images beforehand, so that no run asks the teacher again (11.9 GB for MS1MV2)",
        "arcface-kd cache configs/ms1mv2_mbf_adadistill.py --kd-teacher r50.pt --out /train_tmp/r50.cache",
    )
    cache.add_argument("config", help="an arcface_torch config, by path or by name in configs/; it is run as Python")
    cache.add_argument("--out", metavar="FILE", help="the cache (default: the config's kd_cache)")
    cache.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="values over those of the config"
    )
    add_arguments(cache)

    demo = command(
        "demo",
        _demo,
        "the whole job in minutes: data, teacher, student alone, student distilled, a table and pictures",
        "arcface-kd demo --data faces --kd-teacher teacher.onnx --kd-option teacher.channels=bgr --seeds 3",
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything it writes (default: demo)")
    demo.add_argument("--data", type=Path, help="a folder with train.rec and .bin sets instead of the drawn faces")
    demo.add_argument("--seeds", type=int, default=1, help="train each student this often and give means (default: 1)")
    demo.add_argument("--epochs", type=int, help="epochs of the students (default: chosen for the data)")
    add_arguments(demo)

    patch = command(
        "patch",
        _patch,
        "add --kd to a checkout of arcface_torch, or other patches: kd_flag, current_stack, cpu_gloo",
        "arcface-kd patch insightface/recognition/arcface_torch",
    )
    patch.add_argument("folder", type=Path, help="arcface_torch, or a checkout of insightface")
    patch.add_argument("names", nargs="*", default=["kd_flag"], help="which patches (default: kd_flag)")
    patch.add_argument("--check", action="store_true", help="say what would happen and write nothing")
    patch.add_argument("--revert", action="store_true", help="take the patches out again, byte for byte")

    recipe = command(
        "recipe",
        _recipe,
        "run arcface_torch as often as a method takes it (shkd: three times); all paths are the trainer's own",
        "arcface-kd recipe insightface/recognition/arcface_torch configs/ms1mv2_mbf_shkd --nproc 8",
    )
    recipe.add_argument("folder", type=Path, help="arcface_torch")
    recipe.add_argument("config", help="as train_v2.py takes it: configs/NAME; --kd flags need the patched trainer")
    recipe.add_argument("--nproc", type=int, default=1, help="processes on this machine (default: 1)")
    recipe.add_argument(
        "--torchrun",
        metavar="WORDS",
        type=shlex.split,
        default=[],
        help='its further options: --torchrun="--nnodes=2 ..."',
    )
    recipe.add_argument("--print", action="store_true", help="print the command of one run and start nothing")
    add_arguments(recipe)

    check = command(
        "check",
        _check,
        "describe a teacher and, with verification pairs, find out how its input should be prepared",
        "arcface-kd check --kd-teacher w600k_r50.onnx --bin faces_emore/lfw.bin",
    )
    check.add_argument("--kd-teacher", metavar="FILE", required=True, help="a checkpoint, an ONNX file, ...")
    check.add_argument("--kd-option", metavar="NAME=VALUE", nargs="+", action="extend", help="such as teacher.std=128")
    check.add_argument("--bin", metavar="FILE", type=Path, help="verification pairs to try preprocessings on")

    compare = command(
        "compare",
        _compare,
        "judge runs side by side and write report.html and report.md: scores with intervals, curves, pairs, cost",
        "arcface-kd compare work_dirs/alone work_dirs/adadistill --data faces_emore --out report --no-faces",
    )
    compare.add_argument("runs", metavar="RUN", nargs="+", help="a run's output folder, of the host or of `train`")
    compare.add_argument(
        "--data", metavar="DIR", type=Path, help="folder with verification sets, *.bin (default: the runs' own `rec`)"
    )
    compare.add_argument(
        "--out", metavar="FOLDER", type=Path, default=Path("report"), help="folder for the report (default: report)"
    )
    compare.add_argument(
        "--no-faces", action="store_true", help="list the hardest pairs by number and leave their images out"
    )
    compare.add_argument("--kd-teacher", metavar="FILE", help="judge a teacher too: a checkpoint, an ONNX file, ...")
    compare.add_argument(
        "--kd-option", metavar="NAME=VALUE", nargs="+", action="extend", help="of the teacher: teacher.std=128"
    )

    judge = command(
        "eval",
        _eval,
        "judge models on verification sets and IJB: accuracy, TAR at FAR, EER, AUC, identification",
        "arcface-kd eval work_dirs/mbf_adadistill student.onnx --data faces_emore IJB_release/IJBC --out results.json",
    )
    judge.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="a run's output folder, a model.pt, an ONNX file or any other teacher; float32 unless an option says more",
    )
    judge.add_argument(
        "--data",
        metavar="DIR",
        nargs="+",
        required=True,
        help="folders with verification sets (*.bin), one such file, or IJB-B or IJB-C with meta/ and loose_crop/",
    )
    judge.add_argument(
        "--kd-option",
        metavar="NAME=VALUE",
        nargs="+",
        action="extend",
        help="how the input of models that are no run folders is prepared, such as teacher.channels=bgr",
    )
    judge.add_argument("--out", metavar="FILE", type=Path, help="write the numbers as JSON, one object a row")
    judge.add_argument("--batch-size", type=int, default=128, help="images a forward pass (default: 128)")

    export = command(
        "export",
        _export,
        "write a student as an ONNX file for insightface, float32 or int8, checked against it on faces",
        "arcface-kd export work_dirs/mbf_adadistill mbf_int8.onnx --int8 --calibration faces_emore",
    )
    export.add_argument("run_folder", metavar="RUN", type=Path, help="a run's output folder, or its model.pt")
    export.add_argument("out", metavar="OUT.onnx", type=Path, help="the file; written when it has passed the check")
    export.add_argument("--int8", action="store_true", help="quantise weights and activations to 8 bits")
    export.add_argument(
        "--calibration", metavar="DIR", help="records whose faces quantise and check (default: drawn faces check)"
    )
    export.add_argument(
        "--images", metavar="N", type=int, default=256, help="quantise with so many faces at most (default: 256)"
    )

    merge = command(
        "merge-head",
        _merge_head,
        "join the class centers that the ranks of a run have saved, ours or arcface_torch's, into one file",
        "arcface-kd merge-head work_dirs/ms1mv2_mbf_adadistill head.pt",
    )
    merge.add_argument("run_folder", metavar="RUN", type=Path, help="the run's output, with checkpoint_gpu_*.pt")
    merge.add_argument("out", metavar="OUT", type=Path, help='the file: {"weight": (C, D), "num_classes": C}')

    data = commands.add_parser(
        "data",
        help="make and look at data sets",
        description="Make and look at data sets.",
        epilog="example: arcface-kd data pack aligned_faces/ faces_own/",
    ).add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    pack = data.add_parser(
        "pack",
        help="write train.rec, train.idx and property from a folder of identities",
        description="Write train.rec, train.idx and property from a folder of identities.",
        epilog="example: arcface-kd data pack aligned_faces/ faces_own/",
    )
    pack.add_argument("folder", type=Path, help="one sub-folder of aligned face images for each identity")
    pack.add_argument("out", type=Path, help="folder for the three files")
    pack.set_defaults(run=_pack)
    subset = data.add_parser(
        "subset",
        help="write records with a few images of each identity, for few-shot runs",
        description="Write records with a few images of each identity, for few-shot runs.",
        epilog="example: arcface-kd data subset faces_emore/ faces_5/ --images-per-identity 5 --seed 0",
    )
    subset.add_argument("folder", type=Path, help="a folder with train.rec and train.idx")
    subset.add_argument("out", type=Path, help="folder for the subset; verification sets come along")
    subset.add_argument("--images-per-identity", type=int, required=True, metavar="N", help="at most so many")
    subset.add_argument("--seed", type=int, default=0, help="decides which ones (default: 0)")
    subset.set_defaults(run=_subset)

    command("methods", _methods, "list the installed methods", "arcface-kd methods")
    return parser


def _printable(message: str) -> str:
    """A message on one line; names of files and what stands in them could otherwise write to the terminal at will."""
    text = " ".join(message.split())
    text = text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _complain(error: BaseException, message: str) -> None:
    """One line to stderr; of several ranks, it names the one that it comes from."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not isinstance(error, RankError)
    rank = f"rank {os.environ.get('RANK', '?')}: " if several else ""
    with contextlib.suppress(OSError):
        print(f"arcface-kd: {rank}{_printable(message)}", file=sys.stderr)


def _flags_first(words: Sequence[str]) -> Sequence[str]:
    """`patch DIR --revert NAME` as argparse can read it: its flags, which have no values, before folder and names."""
    if not words or words[0] != "patch":
        return words
    return ["patch", *sorted(words[1:], key=lambda word: not word.startswith("-"))]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its words; None takes those of the process.

    Returns:
        The exit code: 0, 2 for input that cannot be run, 130 when interrupted, 141 when nobody reads what it prints.
    """
    if not faulthandler.is_enabled():
        # A mapped file that is cut short while it is read, or whose disk fails, ends the process: this says where.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            faulthandler.enable()
    try:
        arguments = build_parser().parse_args(_flags_first(sys.argv[1:] if argv is None else argv))
        arguments.run(arguments)
        # What waits to be written would fail behind this function, with a traceback.
        sys.stdout.flush()
    except BrokenPipeError:
        stop_printing()
        return _NOBODY_READS
    except (ArcfaceKDError, OSError) as error:
        _complain(error, str(error))
        # What still waits to be printed may be what has failed.
        flush_or_stop()
        return 2
    except (MemoryError, RuntimeError) as error:
        from arcface_kd.system.memory import shortage

        lacked = shortage(error, "lower batch_size, or use a machine with more")
        if lacked is None:
            raise
        _complain(error, lacked)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _BROUGHT_ALONG:
            raise
        print(f"arcface-kd: the package {package} is missing: pip install arcface_kd brings it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("arcface-kd: interrupted", file=sys.stderr)
        return 130
    return 0
