"""Packages that are not there: one line says which, and how to get it; everything else goes on without."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arcface_kd.cli import host
from arcface_kd.cli.main import main
from arcface_kd.errors import ConfigError
from arcface_kd.evaluation.report import page as report
from arcface_kd.evaluation.report import pictures as report_pictures
from tests.data.record_sets import encoded
from tests.forked import start, wait


def _without(missing: str, commands: list[list[str]]) -> int:
    for name in missing.split(","):
        sys.modules[name] = None  # type: ignore[assignment]
    return next((code for code in map(main, commands) if code), 0)


def run_without(folder: Path, missing: str, *commands: list[str]) -> tuple[int | None, str]:
    """The exit code and the output of commands in a process that has not imported these packages, and cannot."""
    (code,) = wait([start(_without, missing, commands, log=folder / "log")], 300)
    return code, (folder / "log").read_text()


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("timm", ("check", "--kd-teacher", "timm:resnet18")),
        ("onnx", ("check", "--kd-teacher", "{onnx}")),
        ("onnxruntime", ("check", "--kd-teacher", "{onnx}")),
    ],
)
def test_what_is_missing_is_named_with_how_to_get_it(missing: str, words: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="the model is made with onnx")
    from tests.teachers.onnx_models import face_network

    (tmp_path / "model.onnx").write_bytes(face_network().SerializeToString())
    code, said = run_without(tmp_path, missing, [word.format(onnx=tmp_path / "model.onnx") for word in words])
    assert code == 2, said
    assert said.count("\n") == 1
    assert "pip install" in said
    assert missing in said


@pytest.mark.parametrize(
    ("missing", "ask"),
    [
        ("matplotlib", report_pictures.require_matplotlib),
        ("jinja2", report._template.__wrapped__),
    ],
)
def test_a_report_names_what_it_misses(
    missing: str, ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=f'{missing}: pip install "?{missing}'):
        ask()


def test_training_and_packing_want_none_of_the_extras(tmp_path: Path) -> None:
    faces = tmp_path / "images" / "someone"
    faces.mkdir(parents=True)
    for number in range(4):
        (faces / f"{number}.jpg").write_bytes(encoded(number))
    extras = "mxnet,timm,matplotlib,onnxscript,sklearn,onnx,onnxruntime,insightface,wandb"
    (tmp_path / "small.py").write_text(
        f"from easydict import EasyDict\nconfig = EasyDict(rec={str(tmp_path / 'packed')!r}, network='thin_r10', "
        "num_classes=1, num_image=4, num_epoch=1, warmup_epoch=0, val_targets=[], embedding_size=8, batch_size=2, "
        f"num_workers=0, output={str(tmp_path / 'run')!r})\n"
    )
    pack = ["data", "pack", str(faces.parent), str(tmp_path / "packed")]
    code, said = run_without(tmp_path, extras, pack, ["train", str(tmp_path / "small.py")])
    assert code == 0, said[-2000:]


def test_a_package_of_somebody_else_is_no_matter_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'theirs'", name="theirs")

    monkeypatch.setattr(host, "_methods", fail)
    with pytest.raises(ModuleNotFoundError, match="theirs"):
        main(["methods"])
