"""The drop-ins in a trainer of our own that calls things as arcface_torch does, where no checkout can be had.

Where there is a checkout, the last class holds the stand-in itself to the real trainer's calls.
"""

import ast
import inspect
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from unidiff import PatchSet

from arcface_kd.data.dataset import open_dataset
from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.host.attach import HOST_NAMES, attach
from arcface_kd.host.patching import patches_folder
from arcface_kd.methods.class_centers import initial_centers
from tests.host.trainer.faces import Faces
from tests.host.trainer.launch import head_state, launch, train, write_config
from tests.host.trainer.teacher import Teacher, untrained_teacher

STAND_IN = Path(__file__).parent / "stand_in"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "trainer"
    shutil.copytree(STAND_IN, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def flagged(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in with the lines that ``kd_flag.patch`` adds, each run of them behind the line that goes before it."""
    folder = tmp_path_factory.mktemp("flagged") / "trainer"
    shutil.copytree(plain, folder)
    source = (folder / "train_v2.py").read_text(encoding="utf-8")
    (file,) = PatchSet((patches_folder() / "kd_flag.patch").read_text(encoding="utf-8"))
    for hunk in file:
        before = next(line.value for line in hunk)
        assert source.count(before) == 1, f"the stand-in must hold the line once: {before}"
        source = source.replace(before, before + "".join(line.value for line in hunk if line.is_added))
    (folder / "train_v2.py").write_text(source, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def teacher(faces: Faces, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return untrained_teacher(faces, tmp_path_factory.mktemp("teacher") / "model.pt", 64)


def settings(faces: Faces, output: Path, **changes: object) -> dict[str, object]:
    keys = {"rec": str(faces.folder), "num_classes": faces.num_classes, "num_image": faces.num_image}
    return {**keys, "num_epoch": 2, "output": str(output), **changes}


def losses(output: Path, rank: int = 0) -> list[float]:
    trace: list[float] = json.loads((output / f"losses_{rank}.json").read_text(encoding="utf-8"))
    return trace


@pytest.mark.slow
class TestRuns:
    def test_off_is_off(self, plain: Path, flagged: Path, faces: Faces, tmp_path: Path) -> None:
        for name, folder in (("plain", plain), ("flagged", flagged)):
            train(folder, write_config(folder, "off", settings(faces, tmp_path / name)), ranks=2)
        for rank in (0, 1):
            trace = losses(tmp_path / "plain", rank)
            assert trace == losses(tmp_path / "flagged", rank)
            assert len(trace) == 2 * (faces.num_image // 16)
            assert trace[-1] < trace[0]
        first, second = ((tmp_path / name / "model.pt").read_bytes() for name in ("plain", "flagged"))
        assert first == second

    def test_adadistill_trains(self, flagged: Path, faces: Faces, teacher: Teacher, tmp_path: Path) -> None:
        output = tmp_path / "run"
        config = write_config(flagged, "kd", settings(faces, output, num_epoch=6))
        train(flagged, config, "--kd", "adadistill", "--kd-teacher", str(teacher.file), ranks=2)
        trace = losses(output)
        assert losses(output, 1) == trace, "the loss is that of the global batch"
        assert np.mean(trace[-5:]) < np.mean(trace[:5]) - 1
        centers = torch.cat([head_state(output, rank)["methods.adadistill.centers.weight"] for rank in (0, 1)])
        start = initial_centers(ClassShard(faces.num_classes, 0, 1), 64, 2048)
        means = normalize(teacher.embeddings.reshape(faces.num_classes, -1, 64).mean(1))
        agreement = normalize(centers) @ means.T
        assert float(agreement.diagonal().min()) > 0.8, "a center follows the teacher's embeddings of its class"
        assert agreement.argmax(1).tolist() == list(range(faces.num_classes))
        assert float((normalize(start) * means).sum(1).max()) < 0.5

    def test_an_interrupted_run_goes_on_to_the_same_bytes(
        self, flagged: Path, faces: Faces, teacher: Teacher, tmp_path: Path
    ) -> None:
        arguments = ("--kd", "adadistill", "--kd-teacher", str(teacher.file))
        whole, halves = tmp_path / "whole", tmp_path / "halves"
        train(flagged, write_config(flagged, "whole", settings(faces, whole)), *arguments)
        first = settings(faces, halves, num_epoch=1, num_image=2 * faces.num_image)
        train(flagged, write_config(flagged, "first", first), *arguments)
        begun = losses(halves)
        train(flagged, write_config(flagged, "second", settings(faces, halves, resume=True)), *arguments)
        assert begun + losses(halves) == losses(whole)
        assert (halves / "model.pt").read_bytes() == (whole / "model.pt").read_bytes()

    def test_a_copied_config_needs_no_flag(
        self, plain: Path, flagged: Path, faces: Faces, teacher: Teacher, tmp_path: Path
    ) -> None:
        keys = settings(faces, tmp_path / "copied", num_epoch=1, kd="adadistill", kd_teacher=str(teacher.file))
        train(plain, write_config(plain, "copied", keys, "\nimport arcface_kd\n\narcface_kd.attach(config)"))
        flags = ("--kd", "adadistill", "--kd-teacher", str(teacher.file))
        train(flagged, write_config(flagged, "flags", settings(faces, tmp_path / "flags", num_epoch=1)), *flags)
        assert losses(tmp_path / "copied") == losses(tmp_path / "flags")
        assert (tmp_path / "copied" / "model.pt").read_bytes() == (tmp_path / "flags" / "model.pt").read_bytes()

    def test_a_batch_of_one_with_another_dimension_and_sampled_classes(
        self, flagged: Path, faces: Faces, teacher: Teacher, tmp_path: Path
    ) -> None:
        output = tmp_path / "run"
        # Two ranks with one image each: no batch norm can train on one row, so the stand-in's last layer is left out.
        network = (flagged / "network.py").read_text(encoding="utf-8")
        folder = tmp_path / "trainer"
        shutil.copytree(flagged, folder)
        (folder / "network.py").write_text(
            network.replace("        nn.BatchNorm1d(num_features),\n", ""), encoding="utf-8"
        )
        keys = settings(faces, output, num_epoch=1, batch_size=1, embedding_size=32, gradient_acc=2, optimizer="adamw")
        keys |= {"sample_rate": 0.5, "margin_list": (1.0, 0.0, 0.4)}
        flags = ("--kd", "adadistill", "--kd-teacher", str(teacher.file), "--kd-option", "student.projection=linear")
        train(folder, write_config(folder, "one", keys), *flags, ranks=2)
        trace = losses(output)
        assert len(trace) == faces.num_image // 2
        assert np.isfinite(trace).all()
        projections = [head_state(output, rank)["projection.weight"] for rank in range(2)]
        assert projections[0].shape == (64, 32)
        assert torch.equal(*projections), "the ranks average the projection's gradient"
        assert not [name for name in torch.load(output / "model.pt", weights_only=True) if "projection" in name]

    def test_faces_without_labels(self, flagged: Path, faces: Faces, teacher: Teacher, tmp_path: Path) -> None:
        records = open_dataset(faces.folder)
        for index in range(16):
            (tmp_path / f"{index}.jpg").write_bytes(records.image_bytes(index))
        keys = settings(faces, tmp_path / "run", rec=str(tmp_path), num_classes=0, num_image=16, num_epoch=1)
        config, arguments = write_config(flagged, "nobody", keys), ("--kd-teacher", str(teacher.file))
        train(flagged, config, "--kd", "embedding+rkd", *arguments)
        assert len(losses(tmp_path / "run")) == 2
        refused = launch(flagged, config, "--kd", "ekd", *arguments)
        assert refused.exit_code != 0
        assert "ekd needs labels" in refused.printed

    def test_what_is_wrong_is_said_before_anything_is_written(
        self, flagged: Path, faces: Faces, tmp_path: Path
    ) -> None:
        config = write_config(flagged, "wrong", settings(faces, tmp_path / "run"))
        for arguments, message in (
            (["--kd", "adadistil"], "did you mean 'adadistill'"),
            (["--kd", "adadistill"], "--kd-teacher FILE"),
            (["--kd", "adadistill", "--kd-teacher", str(tmp_path / "none.pt")], "none.pt"),
        ):
            run = launch(flagged, config, *arguments)
            assert run.exit_code != 0
            assert message in run.printed
            assert not (tmp_path / "run").exists()


def test_the_drop_ins_take_what_the_trainer_gives(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put into a module that has the stand-in's own functions as its globals."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    trainer, before = types.ModuleType("train_v2"), {}
    for name, source in zip(HOST_NAMES, ("network", "loader", "head"), strict=True):
        monkeypatch.delitem(sys.modules, source, raising=False)
        trainer.__dict__[name] = getattr(__import__(source), name)
        monkeypatch.delitem(sys.modules, source)
        before[name] = inspect.signature(trainer.__dict__[name])
    attach({"kd": "adadistill", "kd_teacher": str(teacher.file)}, trainer=trainer)
    for name in HOST_NAMES:
        drop_in = inspect.signature(getattr(trainer, name))
        for theirs, ours in zip(before[name].parameters.values(), drop_in.parameters.values(), strict=True):
            assert (theirs.name, theirs.kind, theirs.default) == (ours.name, ours.kind, ours.default), name


def calls(source: str) -> list[tuple[str, int, tuple[str, ...]]]:
    """Name, number of positional and names of keyword arguments of each call, in the order of the text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            shape = (len(node.args), tuple(sorted(word.arg or "**" for word in node.keywords)))
            found.append((node.lineno, node.col_offset, name, *shape))
    return [(name, count, words) for _, _, name, count, words in sorted(found)]


@pytest.mark.trainer
class TestTheRealTrainer:
    # What the drop-ins meet: made by a call of this name, from a call of this shape, one after the other.
    CONTRACT = (
        "get_config",
        "get_dataloader",
        "get_model",
        "DistributedDataParallel",
        "register_comm_hook",
        "_set_static_graph",
        "CombinedMarginLoss",
        "PartialFC_V2",
        "SGD",
        "AdamW",
        "PolynomialLRWarmup",
        "load_state_dict",
        "set_epoch",
        "clip_grad_norm_",
        "state_dict",
        "parse_args",
    )

    def shapes(self, source: str) -> dict[str, tuple[int, tuple[str, ...]]]:
        first: dict[str, tuple[int, tuple[str, ...]]] = {}
        for name, count, words in calls(source):
            if name in self.CONTRACT:
                first.setdefault(name, (count, words))
        return first

    def test_the_stand_in_calls_as_it_does(self, arcface_torch: Path) -> None:
        real = self.shapes((arcface_torch / "train_v2.py").read_text(encoding="utf-8"))
        ours = self.shapes((STAND_IN / "train_v2.py").read_text(encoding="utf-8"))
        assert list(real) == list(ours)
        # Starred margins count as one argument here and as three there.
        assert real.pop("CombinedMarginLoss")[0] == 5
        assert ours.pop("CombinedMarginLoss")[0] == 3
        assert real == ours

    def test_the_stand_in_has_its_globals_and_its_margin(self, arcface_torch: Path) -> None:
        for file, name, twin in (
            ("partial_fc_v2.py", "PartialFC_V2", "head.py"),
            ("losses.py", "CombinedMarginLoss", "head.py"),
            ("dataset.py", "get_dataloader", "loader.py"),
            ("backbones/__init__.py", "get_model", "network.py"),
        ):
            assert arguments_of(arcface_torch / file, name) == arguments_of(STAND_IN / twin, name)

    def test_its_trainer_takes_the_names_into_its_globals(self, arcface_torch: Path) -> None:
        tree = ast.parse((arcface_torch / "train_v2.py").read_text(encoding="utf-8"))
        imported = {
            alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        assert set(HOST_NAMES) <= imported


def arguments_of(file: Path, name: str) -> list[tuple[str, str | None]]:
    """Names and defaults of what a function, or a class when it is made, takes."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = (ast.ClassDef, ast.FunctionDef)
    (node,) = [node for node in tree.body if isinstance(node, nodes) and node.name == name]
    if isinstance(node, ast.ClassDef):
        (node,) = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    assert isinstance(node, ast.FunctionDef)
    words = [argument.arg for argument in node.args.args]
    defaults = [None] * (len(words) - len(node.args.defaults)) + [ast.unparse(value) for value in node.args.defaults]
    both = list(zip(words, defaults, strict=True))
    return both + ([("**", None)] if node.args.kwarg else [])
