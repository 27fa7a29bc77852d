r"""Make the files that the tests of this folder read. Run it by hand, in a checkout of commit a44a264.

    git clone REPOSITORY old && cd old && git checkout a44a264 && make .venv/ready-test
    cp -r ../tests/compatibility tests/
    OMP_NUM_THREADS=1 .venv/bin/python -m tests.compatibility.record RECOGNITION/ARCFACE_TORCH
    cp tests/compatibility/files/* ../tests/compatibility/files/

It leaves ``files/a44a264.tar.xz``, all that a run of the package reads and writes, and ``files/a44a264.json``, the
results. Nothing of arcface_torch is in them: of a patched trainer, line numbers and the lines that we have added.

Commit 665d537 changed GKD's groups on purpose, and nothing else: the losses of GKD in a44a264.json are those that the
same command gives there.
"""

import argparse
import dataclasses
import difflib
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import arcface_kd
from tests.compatibility.runs import (
    CLASSES,
    DIMENSION,
    IMAGES,
    RUNS,
    SHKD,
    SHKD_TEACHER_EPOCHS,
    Run,
    add_network,
    command,
)
from tests.compatibility.same_losses import losses_of, write_config
from tests.compatibility.signatures import public_signatures

ROOT = Path(__file__).parents[2]
FILES = Path(__file__).with_name("files")
FINISHED = ("alone-1", "adadistill-1")
HALF_FILLED = ("half", "half.json")
# Two of our patches make the trainer run here; the third is the flag. Both ways of using it are tried.
PATCHES = ("current_stack", "cpu_gloo", "kd_flag")
HOST_KEYS = {
    **Run(None, 1).config("work_dirs/old"),
    **{"network": "mbf", "num_epoch": 1, "lr": 0.001, "fp16": False},
}


def draw_images(folder: Path) -> None:
    """Identities as blocks of colour that vary a little: files of a few hundred bytes, the same pixels everywhere.

    Args:
        folder: made, with a sub-folder for each identity.
    """
    import cv2
    import numpy as np

    random = np.random.default_rng(0)
    for identity in range(CLASSES):
        (folder / f"{identity:02}").mkdir(parents=True)
        pattern = random.integers(40, 216, (7, 7, 3))
        for image in range(IMAGES):
            blocks = (pattern + random.integers(-20, 21, pattern.shape)).astype(np.uint8)
            file = folder / f"{identity:02}" / f"{image}.png"
            assert cv2.imwrite(str(file), cv2.resize(blocks, (112, 112), interpolation=cv2.INTER_NEAREST))


def write_onnx_teacher(path: Path) -> None:
    """Average pooling and one layer.

    Args:
        path: the file.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(1).normal(0, 1, (3 * 7 * 7, DIMENSION)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["images"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["embedding"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 112, 112])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", DIMENSION])
    graph = helper.make_graph(nodes, "teacher", [images], [embedding], [numpy_helper.from_array(weight, "weight")])
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), str(path))


def install_plugin() -> None:
    """Put the package of ``examples/`` into ``plugin``, as pip would."""
    shutil.copytree(ROOT / "examples" / "similarity_method", "plugin", ignore=shutil.ignore_patterns("[!a]*"))
    about = Path("plugin") / "arcface_kd_similarity-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: arcface_kd_similarity\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text(
        "[arcface_kd.methods]\nsimilarity = arcface_kd_similarity:SimilarityPreserving\n"
    )


def train_runs(names: Sequence[str]) -> None:
    """Train runs to their end, and keep what they had left after the first epoch as ``NAME.begun``.

    Args:
        names: of the runs.
    """
    add_network()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        from torch import distributed

        distributed.init_process_group("gloo")
    for name in names:

        def keep(epoch: int, name: str = name) -> None:
            if epoch == 1:
                kept = Path(f"{name}.begun")
                kept.mkdir(exist_ok=True)
                shutil.copy(Path(name) / f"checkpoint_gpu_{rank}.pt", kept)
                if rank == 0:
                    shutil.copy(Path(name) / "model.pt", kept)
                if name == "half-filled":
                    # The second epoch fills more of it.
                    for file in HALF_FILLED:
                        shutil.copy(file, f"{file}.begun")

        arcface_kd.train(arcface_kd.load_config(f"{name}.py"), on_epoch=keep)


def _torchrun(*names: str) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.compatibility.record"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:plugin"}
    subprocess.run([sys.executable, *words, "--train", *names], check=True, env=environment)


def record_runs() -> dict[str, Any]:
    """Make records, teacher, caches and all runs in the working folder; returns the losses by run and step."""
    add_network()
    draw_images(Path("images"))
    assert command("data", "pack", "images", "records") == 0
    shutil.rmtree("images")
    faces = arcface_kd.RecordDataset("records")
    with arcface_kd.RecordReader("records/train.rec", "records/train.idx") as reader:
        # Behind a record's header of 24 bytes is its image.
        images = [bytes(reader.read(int(key)))[24:] for key in faces.keys]
    others = [(image + IMAGES * (image % 3 + 1)) % len(images) for image in range(len(images))]
    pairs = [(2 * at, 2 * at + 1) for at in range(CLASSES)] + [(at, others[at]) for at in range(0, len(images), 2)]
    arcface_kd.write_bin(
        "records/pairs.bin", [images[at] for pair in pairs for at in pair], [at < CLASSES for at in range(2 * CLASSES)]
    )
    write_onnx_teacher(Path("teacher.onnx"))
    write_config(
        Path("teacher.py"),
        Run(None, 2, {"num_epoch": 30, "lr": 0.1, "margin_list": (1.0, 0.0, 0.0)}).config("teacher"),
    )
    _torchrun("teacher")
    shutil.rmtree("teacher.begun")
    assert command("merge-head", "teacher", "head.pt") == 0
    for name, run in RUNS.items():
        write_config(Path(f"{name}.py"), run.config(name))
    install_plugin()
    assert command("cache", "tcs-1.py", "--kd-teacher", "teacher/model.pt") == 0
    train_runs([name for name, run in RUNS.items() if run.ranks == 1])
    _torchrun(*(name for name, run in RUNS.items() if run.ranks == 2))
    losses: dict[str, Any] = {name: losses_of(Path(name)) for name in RUNS}
    losses |= _on_one_rank() | _shkd()
    for name in RUNS:
        if name in FINISHED:
            shutil.copytree(name, Path("finished") / name, ignore=shutil.ignore_patterns("checkpoint*"))
        shutil.rmtree(name)
    for path in Path().glob("*.begun"):
        path.rename(path.with_suffix("") if path.is_dir() else path.name.removesuffix(".begun"))
    return losses


def _on_one_rank() -> dict[str, Any]:
    """Runs of two ranks that one rank goes on with, at twice the batch size."""
    losses = {}
    for name, run in RUNS.items():
        if run.ranks == 2 and run.kd != "similarity":
            shutil.copytree(f"{name}.begun", f"{name}.one")
            changes = ["resume=True", "batch_size=8", f"output={name}.one"]
            assert command("train", f"{name}.py", "--set", *changes) == 0
            losses[f"{name} on one rank"] = losses_of(Path(f"{name}.one"))
            shutil.rmtree(f"{name}.one")
    return losses


def _shkd() -> dict[str, Any]:
    """SH-KD's three runs; kept is what there is one epoch before the end of the second."""
    train_stages = importlib.import_module("arcface_kd.recipe").train_stages
    write_config(Path("shkd.py"), SHKD.config("shkd"))
    stages: list[int] = []

    def keep(epoch: int) -> None:
        if stages[-1] == 2 and epoch == SHKD_TEACHER_EPOCHS - 1:
            shutil.copytree("shkd", "shkd.begun", ignore=shutil.ignore_patterns("tensorboard", "*.log"))

    train_stages(arcface_kd.load_config("shkd.py"), lambda stage: stages.append(stage.number), keep)
    losses = {name: losses_of(Path("shkd") / name) for name in (".", "stage1_student", "stage2_teacher")}
    shutil.rmtree("shkd")
    Path("shkd.begun").rename("shkd")
    return {"shkd": losses}


def public_face() -> dict[str, Any]:
    """Names, commands with their flags, entry points, options and configs."""
    # Where that commit had them.
    cli, config, options_of = (
        importlib.import_module(f"arcface_kd.{name}") for name in ("cli", "config", "teachers.options")
    )
    groups = ("arcface_kd.methods", "arcface_kd.teachers", "console_scripts")
    entries = {
        group: sorted({e.name for e in metadata.entry_points(group=group) if e.value.startswith("arcface_kd.")})
        for group in groups
    }
    methods = {e.name: e.load() for e in metadata.entry_points(group="arcface_kd.methods")}
    options = {name: _fields(kind.Config) for name, kind in sorted(methods.items())}
    return {
        "names": sorted(arcface_kd.__all__),
        "signatures": public_signatures(),
        "entry_points": entries,
        "commands": _commands(cli.build_parser(), ()),
        "keys": sorted({**config.BASE, **config.RUN_KEYS}),
        "options": {
            **options,
            "teacher": _fields(options_of.TeacherOptions),
            "student": {"projection": "none", "init": None},
        },
        "configs": {
            path.stem: json.loads(json.dumps(arcface_kd.load_config(str(path))))
            for path in sorted((ROOT / "configs").glob("*.py"))
        },
    }


def _fields(kind: Any) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(kind)}


def _commands(parser: argparse.ArgumentParser, before: tuple[str, ...]) -> list[list[str]]:
    """A command line of each command, with every positional and every flag; the positionals come first."""
    positionals: list[str] = []
    flags: list[str] = []
    below: list[list[str]] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                below += _commands(sub, (*before, name))
        elif not isinstance(action, argparse._HelpAction):
            value = next(iter(action.choices)) if action.choices else "1" if action.type in (int, float) else "a=b"
            words = [] if action.nargs == 0 else [str(value)]
            if action.option_strings:
                flags += [action.option_strings[-1], *words]
            else:
                positionals += words
    return below or [[*before, *positionals, *flags]]


def edits(before: bytes, after: bytes) -> list[tuple[int, int, list[str]]]:
    """The lines of one text that another replaces, as ``(first, behind the last, new lines)``, from the last up.

    Args:
        before: of the host.
        after: with our patches.
    """
    old, new = before.decode().splitlines(keepends=True), after.decode().splitlines(keepends=True)
    codes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [(i, j, new[k:m]) for tag, i, j, k, m in reversed(codes) if tag != "equal"]


def record_patched_trainer(arcface_torch: Path) -> dict[str, Any]:
    """What the patches of this commit make of the trainer, and the losses that it then gives.

    Args:
        arcface_torch: the trainer as it was published; it is copied.
    """
    host = Path("host")
    ignore = shutil.ignore_patterns(".git", "__pycache__")
    shutil.copytree(arcface_torch, host, ignore=ignore)
    assert command("patch", str(host), *PATCHES) == 0
    changed: dict[str, Any] = {}
    for path in sorted(host.rglob("*")):
        own = arcface_torch / path.relative_to(host)
        if path.is_file() and path.read_bytes() != own.read_bytes():
            changed[str(path.relative_to(host))] = {
                "sha256": hashlib.sha256(own.read_bytes()).hexdigest(),
                "edits": edits(own.read_bytes(), path.read_bytes()),
            }
    return {"files": changed, "losses": train_in_host(host)}


def train_in_host(host: Path, config: str | None = None) -> Mapping[int, float]:
    """Train in a patched trainer beside ``records`` and ``teacher.onnx``; returns its losses.

    Args:
        host: arcface_torch.
        config: one of its configs, with ``output = "work_dirs/old"``; None trains with AdaDistill by the flag.
    """
    words = [f"configs/{config}"]
    if config is None:
        here = Path.cwd()
        write_config(host / "configs" / "flag.py", {**HOST_KEYS, "rec": str(here / "records")})
        words = ["configs/flag", "--kd", "adadistill", "--kd-teacher", str(here / "teacher.onnx")]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train_v2.py", *words]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch], cwd=host, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return losses_of(host / "work_dirs" / "old")


def main() -> None:
    """Record everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arcface_torch", type=Path, nargs="?")
    parser.add_argument("--train", nargs="+")
    arguments = parser.parse_args()
    if arguments.train:
        train_runs(arguments.train)
        return
    arcface_torch, configs = arguments.arcface_torch.absolute(), ROOT / "configs"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        recorded: dict[str, Any] = {"losses": record_runs()}
        assert (
            command("eval", *(f"finished/{name}" for name in FINISHED), "--data", "records", "--out", "scores.json")
            == 0
        )
        recorded |= {
            "scores": json.loads(Path("scores.json").read_text()),
            "public": public_face(),
            "host": record_patched_trainer(arcface_torch),
        }
        shutil.rmtree("host")
        shutil.copytree(configs, "configs", ignore=shutil.ignore_patterns("__pycache__"))
        for path in [*Path().rglob("tensorboard"), *Path().rglob("__pycache__"), *Path().rglob("*.log")]:
            if path.parts[0] != "finished":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        FILES.mkdir(exist_ok=True)
        with tarfile.open(FILES / "a44a264.tar.xz", "w:xz", preset=9) as archive:
            for path in sorted(Path().iterdir()):
                archive.add(path)
        (FILES / "a44a264.json").write_text(json.dumps(recorded, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
