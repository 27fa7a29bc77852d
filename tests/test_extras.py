"""Packages that are not there: one line says which, and how to get it; everything else goes on without."""

import subprocess
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

# Each command in an interpreter of its own that cannot import these.
_WITHOUT = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from arcface_kd.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def run_without(missing: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT, missing, *words], capture_output=True, text=True, check=False, timeout=300
    )


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
    done = run_without(missing, *(word.format(onnx=tmp_path / "model.onnx") for word in words))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "pip install" in done.stderr
    assert missing in done.stderr


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
    packed = run_without(extras, "data", "pack", str(faces.parent), str(tmp_path / "packed"))
    assert packed.returncode == 0, packed.stderr
    (tmp_path / "small.py").write_text(
        f"from easydict import EasyDict\nconfig = EasyDict(rec={str(tmp_path / 'packed')!r}, network='thin_r18', "
        "num_classes=1, num_image=4, num_epoch=1, warmup_epoch=0, val_targets=[], embedding_size=8, batch_size=2, "
        f"num_workers=0, output={str(tmp_path / 'run')!r})\n"
    )
    trained = run_without(extras, "train", str(tmp_path / "small.py"))
    assert trained.returncode == 0, trained.stderr[-2000:]


def test_a_package_of_somebody_else_is_no_matter_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'theirs'", name="theirs")

    monkeypatch.setattr(host, "_methods", fail)
    with pytest.raises(ModuleNotFoundError, match="theirs"):
        main(["methods"])
