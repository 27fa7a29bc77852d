"""``arcface-kd patch`` on trainers that differ from today's arcface_torch: those of 2022, and forks."""

import os
from pathlib import Path

import pytest

from arcface_kd.errors import ConfigError
from arcface_kd.host.checkout import find_checkout
from arcface_kd.host.patching import NEEDED, patch_checkout
from tests.host.test_patching import contents, to_crlf, write_miniature

SCHEDULE = b"""class PolyScheduler(_LRScheduler):
    def __init__(self, optimizer, base_lr, last_epoch=-1):
        super(PolyScheduler, self).__init__(optimizer, -1, False)
"""
TRAINER = b"""import os

def main(args):
    cfg = get_config(args.config)
    print(args.local_rank)


parser.add_argument("config", type=str, help="py config file")
parser.add_argument("--local_rank", type=int, default=0, help="local_rank")
main(parser.parse_args())
"""
DATA = b"""import mxnet as mx
import numpy as np  # mine

class Mine:
    rec = mx.recordio.MXIndexedRecordIO("train.idx", "train.rec", "r")
"""
VERIFICATION = b"""    import mxnet as mx  # slow
    from mxnet import ndarray as nd
    f = interpolate.interp1d(far_train, thresholds, kind="slinear")"""


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    folder = tmp_path / "my fork"
    write_miniature(folder)
    return folder


@pytest.mark.parametrize("crlf", [False, True], ids=["lf", "crlf"])
def test_a_fork_of_a_trainer_of_2022(fork: Path, crlf: bool) -> None:
    (fork / "lr_scheduler.py").write_bytes(SCHEDULE)
    (fork / "train_v2.py").write_bytes(TRAINER)
    (fork / "dataset.py").write_bytes(DATA)
    (fork / "eval/verification.py").write_bytes(VERIFICATION)
    (fork / "eval_ijbc.py").write_bytes(b"# black\n")
    (fork / "scripts/shuffle_rec.py").unlink()
    if crlf:
        to_crlf(fork)
    before = contents(fork)

    outcome = patch_checkout(fork, NEEDED)[1]
    assert "lr_scheduler.py" in outcome.files
    assert outcome.note.endswith(": eval_ijbc.py")
    after = {path: raw.replace(b"\r\n", b"\n") for path, raw in contents(fork).items()}
    assert b"self).__init__(optimizer, -1)  # arcface_kd, was: super(" in after["lr_scheduler.py"]
    assert b'type=int, default=int(os.environ.get("LOCAL_RANK", 0)), help=' in after["train_v2.py"]
    assert after["dataset.py"].startswith(b"from arcface_kd.data import as_mxnet as mx  # arcface_kd, was: import")
    assert after["eval/verification.py"].splitlines() == [
        b"    from arcface_kd.data import as_mxnet as mx  # arcface_kd, was: import mxnet as mx  # slow",
        b"    from arcface_kd.data.as_mxnet import ndarray as nd  # arcface_kd, was: from mxnet import ndarray as nd",
        b"    f = lambda far: np.interp(far, far_train, thresholds)  # arcface_kd, was: "
        b'f = interpolate.interp1d(far_train, thresholds, kind="slinear")',
    ]
    assert not any(outcome.files for outcome in patch_checkout(fork, NEEDED))
    patch_checkout(fork, NEEDED, revert=True)
    assert contents(fork) == before


def test_what_the_user_has_mended_before_keeps_nothing_out(fork: Path) -> None:
    schedule = fork / "lr_scheduler.py"
    schedule.write_bytes(schedule.read_bytes().replace(b", verbose=verbose)", b")"))
    (fork / "dataset.py").write_bytes(b"import cv2\n")
    mended = contents(fork)
    (outcome,) = patch_checkout(fork, ["current_stack"])
    assert "eval/verification.py" in outcome.files
    assert {"lr_scheduler.py", "dataset.py"}.isdisjoint(outcome.files)
    assert contents(fork)["dataset.py"] == mended["dataset.py"]


def test_a_data_set_beside_the_own_keeps_its_imports(fork: Path) -> None:
    data = fork / "dataset.py"
    data.write_bytes(data.read_bytes() + b"\n" + DATA.partition(b"\n\n")[2])
    before = data.read_bytes()
    (outcome,) = patch_checkout(fork, ["current_stack"])
    assert b"as_mxnet as mx" in data.read_bytes()
    assert b"import open_dataset" not in data.read_bytes()
    assert "onnx_ijbc.py" in outcome.files
    patch_checkout(fork, ["current_stack"], revert=True)
    assert data.read_bytes() == before


def test_a_patched_file_that_was_changed_is_not_left_patched_in_silence(fork: Path) -> None:
    patch_checkout(fork, NEEDED)
    data = fork / "dataset.py"
    data.write_bytes(data.read_bytes().replace(b"face.image.flip(-1)", b"mine(face.image)"))
    before = contents(fork)
    with pytest.raises(ConfigError, match=r"dataset\.py was changed"):
        patch_checkout(fork, NEEDED, revert=True)
    assert contents(fork) == before


def test_a_training_file_that_is_not_there_does_not_keep_the_flag_out(fork: Path) -> None:
    (fork / "dataset.py").unlink()
    with pytest.raises(ConfigError, match=r"dataset\.py is missing.*patch DIR kd_flag"):
        patch_checkout(fork, NEEDED)
    assert patch_checkout(fork, ["kd_flag"])[0].files


def test_names_of_the_user_s_own_are_kept(fork: Path) -> None:
    trainer = fork / "train_v2.py"
    trainer.write_bytes(
        b"self.cfg: EasyDict = get_config(self.args.config)\nargs, rest = self.parser.parse_known_args()\n"
    )
    before = trainer.read_bytes()
    patch_checkout(fork)
    text = trainer.read_text(encoding="utf-8")
    assert "attach(self.cfg, self.args)\n" in text
    assert "add_arguments(self.parser)\nargs, rest" in text
    patch_checkout(fork, revert=True)
    assert trainer.read_bytes() == before


@pytest.mark.parametrize(
    "own",
    [
        TRAINER.replace(b"main(parser.parse_args())", b"main(\n    parser.parse_args()\n)"),
        TRAINER.replace(b"get_config(args.config)", b"get_config(path)"),
    ],
    ids=["within a call", "no arguments"],
)
def test_a_trainer_into_which_the_flag_does_not_fit_is_left_whole(fork: Path, own: bytes) -> None:
    (fork / "train_v2.py").write_bytes(own)
    with pytest.raises(ConfigError, match="Add by hand"):
        patch_checkout(fork)
    assert (fork / "train_v2.py").read_bytes() == own


@pytest.mark.parametrize("flags", [b"arcface_kd.add_arguments(parser)\n", b""])
def test_lines_put_in_by_hand_are_not_put_in_again(fork: Path, flags: bytes) -> None:
    trainer = fork / "train_v2.py"
    own = TRAINER.replace(b"import os\n", b"import os\nimport arcface_kd\n")
    own = own.replace(b"    print", b"    cfg.mine = 1\n    arcface_kd.attach(cfg, args)\n    print")
    trainer.write_bytes(own.replace(b"main(parser", flags + b"main(parser"))
    before = contents(fork)
    (outcome,) = patch_checkout(fork)
    assert ("add_arguments(parser)" in outcome.note) is (not flags)
    assert patch_checkout(fork, revert=True)[0].note
    assert contents(fork) == before


@pytest.mark.parametrize(("name", "means"), [("train.py", "4f227ba5"), ("my_train.py", "Add by hand")])
def test_a_checkout_without_train_v2(fork: Path, name: str, means: str) -> None:
    (fork / "backbones").mkdir()
    os.rename(fork / "train_v2.py", fork / name)
    with pytest.raises(ConfigError, match=means):
        find_checkout(fork)
