"""Commands that judge and ship: ``check``, ``compare``, ``eval`` and ``export``."""

import argparse
from functools import partial
from pathlib import Path

from arcface_kd.cli.command import Commands, add_teacher_options, teacher_options_of
from arcface_kd.errors import ConfigError


def add_commands(commands: Commands) -> None:
    """Add the family."""
    check = commands.add(
        "check",
        _check,
        "describe a teacher and, with verification pairs, find out how its input should be prepared",
        "arcface-kd check --kd-teacher w600k_r50.onnx --bin faces_emore/lfw.bin",
    )
    check.add_argument(
        "--kd-teacher",
        metavar="FILE",
        action="append",
        required=True,
        help="a checkpoint, an ONNX file, ...; given several times, all of them as one teacher",
    )
    add_teacher_options(check, "such as teacher.std=128")
    check.add_argument("--bin", metavar="FILE", type=Path, help="verification pairs to try preprocessings on")

    compare = commands.add(
        "compare",
        _compare,
        "judge runs side by side and write report.html and report.md: scores with intervals, curves, pairs, cost",
        "arcface-kd compare work_dirs/alone work_dirs/adadistill --data faces_emore --out report --no-faces",
    )
    compare.add_argument("runs", metavar="RUN", nargs="+", help="a run's output folder, or an exported .onnx file")
    compare.add_argument(
        "--data",
        metavar="DIR",
        nargs="+",
        help="folders with verification sets, IJB or TinyFace, as for eval (default: the runs' own `rec`)",
    )
    _add_ways_to_judge(compare)
    compare.add_argument(
        "--out", metavar="FOLDER", type=Path, default=Path("report"), help="folder for the report (default: report)"
    )
    compare.add_argument(
        "--no-faces", action="store_true", help="list the hardest pairs by number and leave their images out"
    )
    compare.add_argument(
        "--kd-teacher",
        metavar="FILE",
        action="append",
        default=[],
        help="judge a teacher too: a checkpoint, an ONNX file, ...; given several times, all of them as one",
    )
    add_teacher_options(compare, "of the teacher: teacher.std=128")
    compare.add_argument(
        "--network",
        metavar="python:MODULE:FUNCTION",
        nargs="+",
        action="extend",
        default=[],
        help="networks of your own that the runs trained; they are imported",
    )

    _add_eval(commands)
    _add_export(commands)


def _add_eval(commands: Commands) -> None:
    judge = commands.add(
        "eval",
        _eval,
        "judge models on verification sets, IJB and TinyFace: accuracy, TAR at FAR, identification, latency, size",
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
        default=[],
        help="folders with verification sets (*.bin), one such file, IJB-B or IJB-C with meta/ and loose_crop/, or "
        "TinyFace with Probe/, Gallery_Match/ and Gallery_Distractor/",
    )
    _add_ways_to_judge(judge)
    add_teacher_options(
        judge,
        "how the input of models that are no run folders is prepared, such as teacher.channels=bgr, and a network of "
        "your own, teacher.network=python:MODULE:FUNCTION",
    )
    judge.add_argument("--out", metavar="FILE", type=Path, help="write the numbers as JSON, one object a row")
    judge.add_argument("--batch-size", type=int, default=128, help="images a forward pass (default: 128)")


def _add_ways_to_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--low-res",
        metavar="PX,PX",
        default="",
        help="judge verification sets besides with one image of each pair downscaled to so many pixels, and with both: "
        "14,28,56",
    )
    parser.add_argument(
        "--groups",
        metavar="NAME=FILE,FILE",
        nargs="+",
        action="extend",
        default=[],
        help="verification sets whose mean accuracy, deviation and worst over best error are told: RFW=a.bin,b.bin",
    )
    parser.add_argument(
        "--gallery-model",
        metavar="MODEL",
        help="judge each model's probes besides against galleries that this one has embedded, such as its teacher",
    )


def _low_res_of(arguments: argparse.Namespace) -> list[int]:
    words = [word for word in arguments.low_res.split(",") if word]
    if not all(word.isdecimal() and 1 <= int(word) < 112 for word in words):
        raise ConfigError(f"--low-res {arguments.low_res!r}: wanted numbers of pixels below 112, such as 14,28,56")
    return [int(word) for word in words]


def _groups_of(arguments: argparse.Namespace) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for word in arguments.groups:
        name, _, files = word.partition("=")
        # No shell expands a ~ in the middle of a word.
        found = [Path(file).expanduser() for file in files.split(",") if file]
        if not name or name in groups or len({file.resolve() for file in found}) < 2:
            raise ConfigError(
                f"--groups {word!r}: wanted NAME=FILE,FILE with a name of its own and two verification sets at least"
            )
        groups[name] = found
    return groups


def _add_export(commands: Commands) -> None:
    export = commands.add(
        "export",
        _export,
        "write a student as an ONNX file for insightface, float32 or int8, checked against it on faces",
        "arcface-kd export work_dirs/mbf_adadistill mbf_int8.onnx --int8 --calibration faces_emore",
    )
    export.add_argument("run_folder", metavar="RUN", type=Path, help="a run's output folder, or its model.pt")
    export.add_argument(
        "out", metavar="OUT", type=Path, help="the .onnx file, or with --pack the folder; written after the check"
    )
    export.add_argument(
        "--pack",
        metavar="DETECTOR.onnx",
        help="write a model pack of insightface, such as ~/.insightface/models/NAME, with this face detector in it",
    )
    add_teacher_options(export, "a network of your own: teacher.network=python:MODULE:FUNCTION")
    export.add_argument("--int8", action="store_true", help="quantise weights and activations to 8 bits")
    export.add_argument(
        "--calibration", metavar="DIR", help="records whose faces quantise and check (default: drawn faces check)"
    )
    export.add_argument(
        "--images", metavar="N", type=int, default=256, help="quantise with so many faces at most (default: 256)"
    )
    export.add_argument(
        "--tune",
        metavar="STEPS",
        type=int,
        default=0,
        help="fine-tune for int8 before, on the faces of --calibration and without their labels, such as 500 steps",
    )


def _check(arguments: argparse.Namespace) -> None:
    from arcface_kd.data.formats.verification_bin import read_bin
    from arcface_kd.evaluation.teacher_check import check_teacher
    from arcface_kd.system.device import default_device
    from arcface_kd.teachers.base import load_teacher

    options = teacher_options_of(arguments)
    pairs = None if arguments.bin is None else read_bin(arguments.bin)
    print(check_teacher(load_teacher(arguments.kd_teacher, options, device=default_device()), pairs))


def _compare(arguments: argparse.Namespace) -> None:
    from arcface_kd.evaluation.report.comparison import (
        compare,
        data_of,
        file_contestant,
        model_names,
        read_runs,
        run_contestant,
        teacher_contestant,
    )
    from arcface_kd.evaluation.report.page import write_report
    from arcface_kd.evaluation.report.pictures import require_matplotlib
    from arcface_kd.evaluation.scoring import find_files, load_models
    from arcface_kd.system.device import default_device
    from arcface_kd.teachers.base import load_teacher

    require_matplotlib()
    options = dict(teacher_options_of(arguments) or {})
    teacher, gallery = tuple(arguments.kd_teacher), arguments.gallery_model
    if not teacher and gallery is None and options:
        raise ConfigError("teacher options were given without a teacher; add --kd-teacher FILE")
    names = model_names(arguments.runs, gallery, taken=["teacher"] if teacher else [])
    exported = [name for name in arguments.runs if name.lower().endswith(".onnx")]
    runs = read_runs([name for name in arguments.runs if name not in exported], names)
    groups = _groups_of(arguments)
    files, others = find_files(arguments.data or ([] if groups else [data_of(runs)]))
    device = default_device()
    models = [run_contestant(run, device, arguments.network) for run in runs]
    students = load_models(exported, device=device)
    models += [file_contestant(file, model, names[file]) for file, model in students.items()]
    if len(teacher) > 1:
        merged = load_teacher(teacher, {"precision": "fp32", **options}, device=device)
        models.append(teacher_contestant(teacher, merged))
        # What is said of one of them is not said of the gallery's model.
        options = {name: value for name, value in options.items() if "." not in name and name != "merge"}
    wanted = list(dict.fromkeys(filter(None, (*(teacher if len(teacher) == 1 else ()), gallery))))
    teachers = load_models(wanted, options, device=device) if wanted else {}
    if len(teacher) == 1:
        models.append(teacher_contestant(teacher[0], teachers[teacher[0]]))
    compared = compare(
        models,
        [*files, *(file for group in groups.values() for file in group)],
        device,
        others=others,
        low_res=_low_res_of(arguments),
        groups=groups,
        gallery=None if gallery is None else (names[gallery], teachers[gallery]),
        progress=True,
    )
    for path in write_report(compared, arguments.out, faces=not arguments.no_faces):
        print(path)


def _eval(arguments: argparse.Namespace) -> None:
    from arcface_kd.evaluation.scoring import run_eval

    groups = _groups_of(arguments)
    if not arguments.data and not groups:
        raise ConfigError("nothing to judge on; add --data DIR or --groups NAME=FILE,FILE")
    run_eval(
        arguments.models,
        arguments.data,
        teacher_options_of(arguments),
        out=arguments.out,
        batch_size=arguments.batch_size,
        low_res=_low_res_of(arguments),
        groups=groups,
        gallery=arguments.gallery_model,
    )


def _export(arguments: argparse.Namespace) -> None:
    from arcface_kd.export.onnx import export
    from arcface_kd.export.pack import export_pack
    from arcface_kd.teachers.options import TeacherOptions

    options = TeacherOptions.of(teacher_options_of(arguments))
    if options != TeacherOptions(network=options.network):
        raise ConfigError("an exported student takes RGB as (x - 127.5) / 127.5: give no option but teacher.network")
    write = export if arguments.pack is None else partial(export_pack, detector=arguments.pack)
    print(
        write(
            arguments.run_folder,
            arguments.out,
            network=options.network,
            int8=arguments.int8,
            calibration=arguments.calibration,
            images=arguments.images,
            tune=arguments.tune,
        )
    )
