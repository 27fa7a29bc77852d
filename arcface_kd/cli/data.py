"""Commands that make data sets and look at them: ``data pack``, ``data pairs``, ``data verify`` and others."""

import argparse
from pathlib import Path

from arcface_kd.cli.command import Commands


def add_commands(commands: Commands) -> None:
    """Add the family."""
    data = commands.group("data", "make and look at data sets", "arcface-kd data pack aligned_faces/ faces_own/")
    pack = data.add(
        "pack",
        _pack,
        "write train.rec, train.idx and property from a folder of identities, or records without labels from images",
        "arcface-kd data pack aligned_faces/ faces_own/",
    )
    pack.add_argument(
        "folder",
        type=Path,
        help="one sub-folder of aligned face images for each identity; or images without labels, DIR or 'DIR/**'",
    )
    pack.add_argument("out", type=Path, help="folder for the three files")
    pack.add_argument(
        "--on-bad-record",
        choices=("stop", "skip"),
        default="stop",
        help="images that cannot be read: name them all and stop, or leave them out (default: stop)",
    )
    pack.add_argument("--follow-links", action="store_true", help="follow symbolic links, which are refused otherwise")

    index = data.add(
        "index",
        _index,
        "build a train.idx that is missing or wrong",
        "arcface-kd data index faces_emore/",
    )
    index.add_argument("records", type=Path, help="a folder with train.rec, or a .rec file")

    subset = data.add(
        "subset",
        _subset,
        "write records with a few images of each identity, for few-shot runs",
        "arcface-kd data subset faces_emore/ faces_5/ --images-per-identity 5 --seed 0",
    )
    subset.add_argument("folder", type=Path, help="a folder with train.rec and train.idx")
    subset.add_argument("out", type=Path, help="folder for the subset; verification sets come along")
    subset.add_argument("--images-per-identity", type=int, required=True, metavar="N", help="at most so many")
    subset.add_argument("--seed", type=int, default=0, help="decides which ones (default: 0)")

    pairs = data.add(
        "pairs",
        _pairs,
        "write a verification set of people whom no network is trained on",
        "arcface-kd data pairs held_out/ faces_own/own.bin --pairs 6000 --seed 0",
    )
    pairs.add_argument("folder", type=Path, help="one sub-folder of aligned face images for each identity, or records")
    pairs.add_argument(
        "out", type=Path, help="the .bin file; NAME.identities.txt beside NAME.bin says who is on its images"
    )
    pairs.add_argument("--pairs", type=int, default=6000, metavar="N", help="at most so many (default: 6000)")
    pairs.add_argument("--seed", type=int, default=0, help="decides which ones (default: 0)")

    align = data.add(
        "align",
        _align,
        "cut the faces out of photographs, 112x112, by the five points of a detector that you have",
        "arcface-kd data align photographs/ aligned_faces/ --detector face_detection_yunet_2023mar.onnx",
    )
    align.add_argument("folder", type=Path, help="photographs, in folders of any depth")
    align.add_argument("out", type=Path, help="folder for the faces, in the same folders; not_found.txt lists the rest")
    align.add_argument(
        "--detector", type=Path, required=True, help="YuNet's file, or a pack's detection network such as det_10g.onnx"
    )
    align.add_argument(
        "--which", choices=("largest", "central"), default="largest", help="of several faces (default: largest)"
    )

    verify = data.add(
        "verify",
        _verify,
        "decode every image of a data set and report what may be wrong with it; exit code 2 where a run would stop",
        "arcface-kd data verify faces_emore/ --num-classes 85742",
    )
    verify.add_argument(
        "sets", type=Path, nargs="+", metavar="DIR", help="records or a folder; several as one data set"
    )
    verify.add_argument(
        "--num-classes", type=int, metavar="N", help="labels must be below it; 0 looks at them as unlabelled"
    )


def _pack(arguments: argparse.Namespace) -> None:
    from arcface_kd.data.pack import pack_folder

    on_bad_record, follow_links = arguments.on_bad_record, arguments.follow_links
    print(pack_folder(arguments.folder, arguments.out, on_bad_record=on_bad_record, follow_links=follow_links))


def _index(arguments: argparse.Namespace) -> None:
    from arcface_kd.data.formats.record_scan import build_index

    print(build_index(arguments.records))


def _subset(arguments: argparse.Namespace) -> None:
    from arcface_kd.data.subset import write_subset

    per_identity, seed = arguments.images_per_identity, arguments.seed
    print(write_subset(arguments.folder, arguments.out, images_per_identity=per_identity, seed=seed))


def _pairs(arguments: argparse.Namespace) -> None:
    from arcface_kd.data.pairs import write_pairs

    print(
        f"{arguments.out}: {write_pairs(arguments.folder, arguments.out, pairs=arguments.pairs, seed=arguments.seed)}"
    )


def _align(arguments: argparse.Namespace) -> None:
    from arcface_kd.data.align_folder import align_folder
    from arcface_kd.data.face_detector import open_detector

    print(align_folder(arguments.folder, arguments.out, open_detector(arguments.detector), which=arguments.which))


def _verify(arguments: argparse.Namespace) -> None:
    from arcface_kd.data.verify import verify
    from arcface_kd.errors import DataError

    one, *more = arguments.sets
    report = verify([one, *more] if more else one, num_classes=arguments.num_classes)
    print(report)
    if report.faults:
        raise DataError(
            f"{len(report.faults)} of {report.images} images would stop a run: mend or remove them, or pass over those "
            "that cannot be read with --on-bad-record skip"
        )
