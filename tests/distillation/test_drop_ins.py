"""The drop-ins beside trainers of several years: what they take, refuse, and tell of a config and its data."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.drop_ins import DropIns, drop_ins, margin_of
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.errors import CheckpointError, ConfigError
from arcface_kd.losses.margin import AdaFaceMargin, Margin
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.options import TeacherOptions
from tests.data.record_sets import insightface_records, write_records
from tests.host.test_attach import Network, config_of, host_get_dataloader, host_get_model
from tests.host.trainer.faces import draw_faces
from tests.reference.problems import ARCFACE


@pytest.mark.parametrize(("stated", "told"), [(20, False), (19, False), (21, False), (5_822_653, True), (8, True)])
def test_num_image_of_another_set_is_told(
    tmp_path: Path, stated: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    write_records(tmp_path, insightface_records([10, 10]))
    config = {"num_classes": 2, "num_image": stated}
    made = drop_ins(lambda: config, distiller=Distiller(KDConfig()))
    assert len(made.get_dataloader(str(tmp_path), 0, 4, num_workers=0).faces) == 20
    assert (f"num_image is {stated}, but the data set holds 20" in caplog.text) is told


def test_what_the_config_and_property_state_wrongly_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_records(tmp_path, insightface_records([10, 10]))
    (tmp_path / "property").write_text("5,112,112\n")
    made = drop_ins(lambda: {"num_classes": 4, "num_image": 100}, distiller=Distiller(KDConfig()))
    made.get_dataloader(str(tmp_path), 0, 4, num_workers=0)
    (said,) = [record.getMessage() for record in caplog.records]
    for number in ("num_image=20", "num_classes is 4", "num_classes=2", "5 classes"):
        assert number in said
    caplog.clear()
    (tmp_path / "property").write_text("2,112,112\n")
    made = drop_ins(lambda: {"num_classes": 2, "num_image": 20}, distiller=Distiller(KDConfig()))
    made.get_dataloader(str(tmp_path), 0, 4, num_workers=0)
    assert caplog.messages == []


def made(tmp_path: Path, **more: Any) -> DropIns:
    config = config_of(tmp_path, kd="adadistill", **more.pop("keys", {}))
    distiller = Distiller(KDConfig.from_config(config), load_teacher(Network(4), TeacherOptions(size=8)))
    return drop_ins(lambda: config, distiller=distiller, **more)


def test_without_a_host_the_backbones_are_ours(tmp_path: Path) -> None:
    student = made(tmp_path).get_model("thin_r18", dropout=0.0, fp16=False, num_features=16)
    assert len(student._forward_pre_hooks) == 1
    with pytest.raises(ConfigError, match="r7"):
        made(tmp_path).get_model("r7")


def test_dali_stays_the_host_s(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = ("there", 0, 4, True, False, 5, 2)
    assert made(tmp_path, host_loader=host_get_dataloader).get_dataloader(*arguments)[1:] == arguments
    assert not caplog.records
    cached = made(tmp_path, host_loader=host_get_dataloader, keys={"kd_cache": str(tmp_path / "cache")})
    with caplog.at_level(logging.WARNING):
        cached.get_dataloader(*arguments)
    assert "kd_cache is off" in caplog.text
    with pytest.raises(ConfigError, match=r"(?i)dali"):
        made(tmp_path).get_dataloader(*arguments)


def test_the_head_has_the_run_s_settings(tmp_path: Path) -> None:
    head = made(tmp_path).PartialFC_V2(Margin(), 4, 11, 0.5, False)
    assert head.shard.num_classes == 11
    assert (head.class_start, head.num_local, head.sample_rate) == (0, 11, 0.5)
    assert head.weight.shape == (11, 4)
    assert head.weight.data_ptr() == head.state_dict()["methods.adadistill.centers.weight"].data_ptr()
    method: Any = head.methods["adadistill"]
    assert method.context.seed == 5
    assert method.context.steps_per_epoch == 10
    assert method.context.sample_rate == 0.5
    assert method.context.product_dtype is None
    assert head.run_folder == tmp_path / "run"
    assert not (tmp_path / "run").exists(), "a head that was only built has written something"


@pytest.mark.parametrize(
    ("products", "fp16", "gpu", "wanted"),
    [
        (None, False, True, None),
        (None, True, True, torch.float16),
        (None, True, False, None),
        ("fp32", True, True, None),
        ("bf16", False, False, torch.bfloat16),
        ("fp16", False, True, torch.float16),
    ],
)
def test_products_are_narrow_where_the_run_is(
    products: str | None,
    fp16: bool,
    gpu: bool,
    wanted: torch.dtype | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {} if products is None else {"kd_option": {"head.products": products}}
    ins = made(tmp_path, keys={"fp16": fp16, **options})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    method: Any = ins.PartialFC_V2(Margin(), 4, 11).methods["adadistill"]
    assert method.context.product_dtype == wanted
    assert (method.centers.units is None) == (wanted is None)


def test_adafaces_margin_takes_the_place_of_the_trainers(tmp_path: Path) -> None:
    keys = {"kd_option": {"head.margin": "adaface"}}
    head = made(tmp_path, keys=keys).PartialFC_V2(Margin(30.0, 1.0, 0.5, 0.0, 0.2), 4, 11)
    method: Any = head.methods["adadistill"]
    assert method.context.margin == AdaFaceMargin(30.0, filter_threshold=0.2)
    assert {"quality.mean", "quality.std"} <= set(head.state_dict())


def test_an_epoch_shorter_than_a_batch_is_one_step(tmp_path: Path) -> None:
    head = made(tmp_path, keys={"num_image": 3}).PartialFC_V2(Margin(), 4, 11)
    method: Any = head.methods["adadistill"]
    assert method.context.steps_per_epoch == 1


def test_a_margin_loss_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Identity"):
        made(tmp_path).PartialFC_V2(nn.Identity(), 4, 11)


class CombinedMarginLoss(nn.Module):
    """The host's attributes."""

    def __init__(self, s: float, m1: float, m2: float, m3: float, interclass_filtering_threshold: float = 0) -> None:
        super().__init__()
        self.s, self.m1, self.m2, self.m3 = s, m1, m2, m3
        self.interclass_filtering_threshold = interclass_filtering_threshold

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits


class Renamed(CombinedMarginLoss):
    """The same margin under another name."""


class Mine(CombinedMarginLoss):
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits * 2


class ArcFace(nn.Module):
    def __init__(self, s: float = 64.0, margin: float = 0.5) -> None:
        super().__init__()
        self.s, self.margin = s, margin

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits


class CosFace(nn.Module):
    def __init__(self, s: float = 64.0, m: float = 0.4) -> None:
        super().__init__()
        self.s, self.m = s, m

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits


@pytest.mark.parametrize(
    ("loss", "margin"),
    [
        (Renamed(64, 1, 0.5, 0, 0.2), Margin(64, 1, 0.5, 0, 0.2)),
        (ArcFace(32, 0.45), Margin(32, 1, 0.45, 0)),
        (CosFace(64, 0.35), Margin(64, 1, 0, 0.35)),
    ],
)
def test_the_host_s_margin_losses_are_read(loss: nn.Module, margin: Margin) -> None:
    assert margin_of(loss) == margin


def test_a_margin_loss_of_the_users_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="Mine"):
        margin_of(Mine(64, 1, 0.5, 0))


def records(tmp_path: Path) -> str:
    return str(draw_faces(tmp_path, identities=2, images=4).folder)


def test_a_trainer_of_2022_has_no_dali_aug(tmp_path: Path) -> None:
    def loader(
        root_dir: str, local_rank: int, batch_size: int, dali: bool = False, seed: int = 2048, num_workers: int = 2
    ) -> None: ...

    given = made(tmp_path, host_loader=loader).get_dataloader(records(tmp_path), 0, 4, False, 7, 0)
    assert given.sampler.seed == 7
    assert given.num_workers == 0


def test_a_second_loader_is_the_host_s(tmp_path: Path) -> None:
    def loader(root_dir: str, local_rank: int, batch_size: int, num_workers: int = 2) -> str:
        return root_dir

    run = made(tmp_path, host_loader=loader)
    training = run.get_dataloader(records(tmp_path), 0, 4, num_workers=0)
    assert run.get_dataloader("validation", 0, 4) == "validation"
    assert run.distiller.faces is training.faces


def test_arguments_of_a_fork_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def loader(root_dir: str, local_rank: int, batch_size: int, mixup: float = 0, num_workers: int = 2) -> None: ...

    made(tmp_path, host_loader=loader).get_dataloader(records(tmp_path), 0, 4, mixup=0.5, num_workers=0)
    assert "mixup" in caplog.text


def test_a_head_of_a_fork_that_lacks_what_is_needed_is_refused(tmp_path: Path) -> None:
    class Head:
        def __init__(self, margin_loss: object, embedding_size: int, classes: int) -> None: ...

    with pytest.raises(ConfigError, match="num_classes"):
        made(tmp_path, host_head=Head).PartialFC_V2(Margin(), 4, 11)


def test_a_schedule_of_steps_wants_as_many_images_a_step_as_before(tmp_path: Path) -> None:
    class Head:
        def __init__(
            self, margin_loss: object, embedding_size: int, num_classes: int, sample_rate: float, fp16: bool
        ) -> None: ...

    def head(batch_size: int, **host: Any) -> DistillationHead:
        torch.manual_seed(0)
        ins = made(tmp_path, keys={"batch_size": batch_size}, **host)
        return ins.PartialFC_V2(Margin(), 4, 11, 1.0, False)

    state = head(4, host_head=Head).state_dict()
    head(4, host_head=Head).load_state_dict(state)
    head(3).load_state_dict(state)
    with pytest.raises(CheckpointError, match="batch_size x ranks was 4 and is now 3"):
        head(3, host_head=Head).load_state_dict(state)


def test_the_host_s_data_set_is_kept_when_asked_for(tmp_path: Path) -> None:
    sets = [str(tmp_path / name) for name in ("one", "two")]
    own = made(tmp_path, host_loader=host_get_dataloader, keys={"kd_loader": "host", "rec_sets": sets})
    with pytest.raises(ConfigError, match="kd_loader"):
        own.get_dataloader(sets[0], 0, 4)
    own = made(tmp_path, host_loader=host_get_dataloader, keys={"kd_loader": "host"})
    assert own.get_dataloader("there", 0, 4)[0] == "the host's own loader"
    forks = made(tmp_path, host_loader=lambda protocol, split: (protocol, split), keys={"kd_loader": "host"})
    assert forks.get_dataloader("folder", split="train") == ("folder", "train")
    with pytest.raises(ConfigError, match="kd_loader"):
        made(tmp_path, keys={"kd_loader": "host"}).get_dataloader("there", 0, 4)
    with pytest.raises(ConfigError, match="kd_cache"):
        made(tmp_path, keys={"kd_loader": "host", "kd_cache": "rows"})


def test_a_head_of_the_trainer_s_own_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    student = made(tmp_path, host_model=host_get_model).get_model("any", num_features=4)
    with pytest.raises(ConfigError, match="PartialFC_V2"):
        student(torch.rand(4, 3, 8, 8)).sum().backward()


def test_a_cache_without_our_loader_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    student = made(tmp_path, host_model=host_get_model, keys={"kd_cache": str(tmp_path / "rows")}).get_model(
        "any", num_features=4
    )
    with pytest.raises(ConfigError, match="kd_cache"):
        student(torch.rand(4, 3, 8, 8))


def test_the_margin_is_read_from_the_host_s_own_object() -> None:
    assert margin_of(CombinedMarginLoss(64, 1.0, 0.5, 0.0)) == Margin(64.0, 1.0, 0.5, 0.0, 0.0)
    assert margin_of(CombinedMarginLoss(30, 1.0, 0.0, 0.4, 0.3)) == Margin(30.0, 1.0, 0.0, 0.4, 0.3)
    assert margin_of(ARCFACE) is ARCFACE


def test_an_object_that_is_no_margin_is_named() -> None:
    with pytest.raises(ConfigError, match="object has no s, m1, m2, m3; a CombinedMarginLoss is wanted"):
        margin_of(object())
    with pytest.raises(ConfigError, match=r"m1 is 0\.5"):
        margin_of(CombinedMarginLoss(64, 0.5, 0.0, 0.0))
