"""Students of the real timm: EdgeFace's sizes, other families, refusals, and a run from training to a file."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from arcface_kd.backbones import get_backbone
from arcface_kd.backbones.timm_network import LowRankLinear, TimmNetwork
from arcface_kd.cli.main import main
from arcface_kd.errors import ConfigError
from arcface_kd.teachers.checkpoint import load_network
from tests.backbones.layout import parameter_count
from tests.host.trainer.faces import draw_faces

pytestmark = pytest.mark.timm

EDGEFACE = {
    "timm:edgenext_xx_small": 1.24,
    "timm:edgenext_x_small:rank=0.6": 1.77,
    "timm:edgenext_small:rank=0.5": 3.65,
    "timm:edgenext_base": 18.23,
}


def faces(count: int) -> Tensor:
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("name", "millions"), EDGEFACE.items())
def test_edgeface_has_the_size_that_its_authors_state(timm: ModuleType, name: str, millions: float) -> None:
    assert round(parameter_count(get_backbone(name)) / 1e6, 2) == millions


def test_parameters_have_edgeface_s_names(timm: ModuleType) -> None:
    network = get_backbone("timm:edgenext_x_small:rank=0.6")
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    # Six tenths of 64 channels, and of 192.
    assert shapes["model.stages.1.blocks.2.xca.qkv.linear1.weight"] == (38, 64)
    assert shapes["model.stages.1.blocks.2.xca.qkv.linear2.bias"] == (192,)
    assert shapes["model.head.fc.linear1.weight"] == (115, 192)
    assert shapes["model.head.fc.linear2.weight"] == (512, 115)


def test_a_low_rank_embedding_is_rebuilt_at_any_size(timm: ModuleType, tmp_path: Path) -> None:
    # Wider than the embedding, whose rank then follows the embedding.
    network = get_backbone("timm:resnet10t:rank=0.5", num_features=100)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    assert load_network(tmp_path / "model.pt").num_features == 100


def test_full_rank_can_hold_any_layer() -> None:
    torch.manual_seed(0)
    linear, low = nn.Linear(6, 4), LowRankLinear(6, 4, 4, bias=True)
    with torch.no_grad():
        low.linear1.weight.copy_(linear.weight)
        low.linear2.weight.copy_(torch.eye(4))
        low.linear2.bias.copy_(linear.bias)
    rows = torch.randn(3, 6)
    torch.testing.assert_close(low(rows), linear(rows))


@pytest.mark.parametrize("model", ["resnet10t", "test_vit", "mobilenetv3_small_050", "edgenext_xx_small"])
def test_any_family_embeds_and_learns(timm: ModuleType, model: str) -> None:
    network = get_backbone(f"timm:{model}", num_features=8, fp16=True)
    images = faces(3)
    embeddings = network(images)
    assert embeddings.shape == (3, 8)
    assert embeddings.dtype == torch.float32
    embeddings.pow(3).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    network.eval()
    with torch.no_grad():
        assert torch.equal(network.tail(network.feature_map(images)), network(images))
        half = network(images)
        network.fp16 = False
        assert not torch.equal(half, network(images))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("timm:no_such_model", "no_such_model"),
        ("timm:dla34", "112x112"),
        ("timm:test_vit:rank=0", "rank"),
        ("timm:test_vit:rank=1.5", "rank"),
    ],
)
def test_refusals(timm: ModuleType, name: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        get_backbone(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_is_trained_judged_and_exported(
    timm: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, folder, run = "timm:edgenext_xx_small:rank=0.5", tmp_path / "faces", tmp_path / "run"
    folder.mkdir()
    drawn = draw_faces(folder, identities=4, images=4)
    keys = {"network": name, "embedding_size": 16, "rec": str(folder), "num_classes": drawn.num_classes}
    keys |= {"num_image": drawn.num_image, "num_epoch": 1, "warmup_epoch": 0, "batch_size": 8, "num_workers": 0}
    keys |= {"val_targets": [], "output": str(run)}
    config = tmp_path / "config.py"
    config.write_text(f"from easydict import EasyDict\n\nconfig = EasyDict({keys!r})\n")
    assert main(["train", str(config)]) == 0
    model = tmp_path / "moved.pt"
    (run / "model.pt").rename(model)
    found = load_network(model)
    assert (found.name, found.num_features, type(found.network)) == (name, 16, TimmNetwork)
    assert main(["eval", str(model), "--data", str(folder)]) == 0
    assert main(["export", str(model), str(tmp_path / "student.onnx")]) == 0
    assert f"{name}, 16 dimensions" in capsys.readouterr().out
    assert main(["check", "--kd-teacher", str(model)]) == 0
