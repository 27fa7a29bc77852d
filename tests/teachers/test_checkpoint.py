"""Backbones out of checkpoints: under any key and prefix, beside a head, and what fits no network."""

import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from arcface_kd.backbones import NETWORKS, get_backbone
from arcface_kd.backbones.vit import VITS, VisionTransformer
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.teachers import Preprocessing, checkpoint, load_teacher
from arcface_kd.teachers.checkpoint import CheckpointSource, find_backbones, is_run_folder, load_network
from tests.teachers.checkpoint_files import prefixed, saved

SMALL = "thin_r10"
SIZE = 24


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small network whose batch statistics are not those of a fresh one."""
    torch.manual_seed(0)
    network = get_backbone(SMALL, num_features=SIZE)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand((2, 3, 112, 112), generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_a_model_pt_embeds_as_the_network_it_was_saved_from(tmp_path: Path, network: nn.Module, images: Tensor) -> None:
    path = saved(tmp_path, network.state_dict())
    teacher = load_teacher(path)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), network(images), rtol=1e-4, atol=1e-5)
    assert teacher.embedding_size == SIZE
    assert teacher.preprocessing == Preprocessing("rgb", (127.5,) * 3, (127.5,) * 3, 112)
    assert teacher.parameter_count == sum(parameter.numel() for parameter in network.parameters())
    assert teacher.description == f"{SMALL} from {path}"


@pytest.mark.parametrize("name", [*NETWORKS, *VITS])
def test_name_and_dimension_are_inferred_from_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        state = {**NETWORKS, **VITS}[name](num_features=128).state_dict()
    assert [(found.name, found.num_features) for found in find_backbones(state)] == [(name, 128)]


def test_every_shape_of_checkpoint_holds_the_same_teacher(tmp_path: Path, network: nn.Module) -> None:
    state = network.state_dict()
    without_counters = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    head = {"weight": torch.zeros(7, SIZE)}
    host = {"epoch": 3, "state_dict_backbone": state, "state_dict_softmax_fc": head, "state_optimizer": optimizer}
    contents: dict[str, object] = {
        "plain": state,
        "compiled ddp": prefixed(state, "module._orig_mod."),
        "without counters": without_counters,
        "host": host,
        "nested": {"state_dict": prefixed(state, "module."), "epoch": 1},
        "AdaFace": {"state_dict": prefixed(state, "model.") | {"head.kernel": torch.ones(SIZE, 7)}},
        "MagFace": {"state_dict": prefixed(state, "features.module.") | {"module.fc.weight": torch.ones(SIZE, 7)}},
        "student": prefixed(state, "module.student._orig_mod."),
        "head beside": state | {"margin.weight": torch.ones(7, SIZE), "step": torch.tensor(3)},
        "twice": prefixed(state, "backbone.") | prefixed(state, "model.backbone."),
        "profiled": {**state, **{f"{name.rpartition('.')[0]}.total_params": torch.zeros(1) for name in state}},
        "another key": {"generator": state, "epoch": 3},
        "two levels": {"model": {"state_dict": state}},
        "compiled inside": {name.replace("stages.0.", "stages.0._orig_mod.", 1): each for name, each in state.items()},
        "averaged": {"ema": {"decay": 0.999, "shadow": prefixed(state, "module.")}},
        "list": [3, state],
    }
    digests = {name: load_network(saved(tmp_path, content)).digest for name, content in contents.items()}
    digests["legacy"] = load_network(saved(tmp_path, state, "legacy.pth", _use_new_zipfile_serialization=False)).digest
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    digests["safetensors"] = load_network(tmp_path / "model.safetensors").digest
    assert len(set(digests.values())) == 1, digests


def test_the_trained_network_comes_before_its_averaged_copy(tmp_path: Path, network: nn.Module) -> None:
    state = network.state_dict()
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    for content in ({"state_dict_ema": averaged, "state_dict": state}, {"ema": averaged, "model": state}):
        found = load_network(saved(tmp_path, content)).network.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "keep",
    [
        lambda one, two: {"student": one, "teacher": two},
        lambda one, two: {**prefixed(one, "encoder_q."), **prefixed(two, "encoder_k.")},
    ],
    ids=["keys", "prefixes"],
)
def test_two_networks_side_by_side_are_not_chosen_between(
    tmp_path: Path, network: nn.Module, keep: Callable[..., object]
) -> None:
    state = network.state_dict()
    path = saved(tmp_path, keep(state, {name: tensor + 1 for name, tensor in state.items()}))
    with pytest.raises(TeacherError, match=r"several networks: .*(student|encoder_q).*(teacher|encoder_k)"):
        load_teacher(path)


def test_what_lies_beside_the_backbone_is_told(
    tmp_path: Path, network: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "arcface_kd"):
        load_network(
            saved(tmp_path, {"net": {**prefixed(network.state_dict(), "body."), "head.kernel": torch.ones(2, 3)}})
        )
    assert "net/body." in caplog.text
    assert "head.kernel" in caplog.text


def test_tensors_among_the_backbones_own_are_warned_of(
    tmp_path: Path, network: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    """A network with one more module is another network; a head on its embeddings is none of its own."""
    state = prefixed(network.state_dict(), "module.")
    load_network(saved(tmp_path, state | {"module.fc2.weight": torch.ones(7, SIZE), "gate.weight": torch.ones(3, 3)}))
    assert not caplog.records
    load_network(saved(tmp_path, state | {"module.gate.weight": torch.ones(3, 3)}))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "module.gate.weight" in record.getMessage()


def test_a_deeper_network_is_not_taken_for_a_shallower_one(tmp_path: Path) -> None:
    """All names and shapes of an r18 are in an r34 too."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in get_backbone("r34", num_features=8).state_dict().items()}
    state = {f"features.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    state.pop("features.layer3.5.bn3.running_var")
    with pytest.raises(TeacherError, match=r"closest is r34: .*'features\.layer3\.5\.bn3\.running_var'"):
        load_teacher(saved(tmp_path, state))


@pytest.mark.parametrize(("prefix", "name"), [("features.module.", None), ("", "iresnet18")])
def test_magface_is_shown_bgr_from_0_to_1_and_its_batch_norms_have_their_own_epsilon(
    tmp_path: Path, images: Tensor, prefix: str, name: str | None
) -> None:
    torch.manual_seed(0)
    theirs = get_backbone("r18", num_features=8).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.eps = 2e-5
            # So small that the epsilon shows.
            assert module.running_var is not None
            module.running_var.uniform_(1e-5, 3e-5)
            module.weight.data.fill_(0.005)
    path = saved(tmp_path, {"arch": "iresnet18", "state_dict": prefixed(theirs.state_dict(), prefix)})
    teacher = load_teacher(path, {"network": name} if name else None)
    assert teacher.preprocessing == Preprocessing("bgr", (0.0,) * 3, (255.0,) * 3)
    assert teacher.description.startswith("r18 of MagFace from")
    with torch.no_grad():
        wanted = theirs((images.flip(1) + 1) / 2)
    torch.testing.assert_close(teacher(images), wanted, rtol=1e-3, atol=1e-4)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.eps = 1e-5
    with torch.no_grad():
        assert (theirs((images.flip(1) + 1) / 2) - wanted).abs().max() > 0.1 * wanted.abs().max()


def test_a_vit_without_its_mask_token_embeds_the_same_and_one_with_landmarks_is_refused(
    tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checkpoint._KNOWN, "small_vit", lambda **size: VisionTransformer(8, 1, **size))
    network = VisionTransformer(8, 1, num_features=8).eval()
    state = network.state_dict()
    state.pop("mask_token")
    teacher = load_teacher(saved(tmp_path, state))
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), network(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(TeacherError, match="landmarks"):
        load_teacher(saved(tmp_path, prefixed(state | {"keypoint_linear.weight": torch.ones(3, 10)}, "net.")))


def test_a_run_s_folder_stands_for_its_student(tmp_path: Path, network: nn.Module) -> None:
    path = saved(tmp_path, network.state_dict())
    # Older versions of arcface_torch leave it there; it may be of another epoch.
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07")
    assert load_teacher(tmp_path).description == f"{SMALL} from {tmp_path}"
    assert is_run_folder(tmp_path)
    assert is_run_folder(str(tmp_path))
    (tmp_path / "zoo").mkdir()
    saved(tmp_path / "zoo", network.state_dict(), "backbone.pth")
    saved(tmp_path / "zoo", torch.ones(2, SIZE), "rank_0_softmax_weight.pt")
    (tmp_path / "ranks").mkdir()
    saved(tmp_path / "ranks", {"state_dict_backbone": network.state_dict()}, "checkpoint_gpu_0.pt")
    digests = {load_network(tmp_path / folder).digest for folder in ("", "zoo", "ranks")}
    assert len(digests) == 1
    other = {name: tensor + 1e-3 for name, tensor in network.state_dict().items()}
    assert load_network(saved(tmp_path / "zoo", other, "backbone.pth")).digest not in digests
    for source in (path, tmp_path / "none", "timm:vit", network, None):
        assert not is_run_folder(source)
    path.write_bytes(b"damaged")
    with pytest.raises(TeacherError, match=r"model.pt"):
        load_teacher(tmp_path)


def test_float16_weights_are_computed_with_in_float32(tmp_path: Path, network: nn.Module, images: Tensor) -> None:
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in network.state_dict().items()
    }
    teacher = load_teacher(saved(tmp_path, halves))
    assert isinstance(teacher.network, nn.Module)
    assert {parameter.dtype for parameter in teacher.network.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), network(images), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("precision", "wanted"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_reaches_the_convolutions_of_a_backbone(
    tmp_path: Path, network: nn.Module, images: Tensor, precision: str, wanted: torch.dtype
) -> None:
    half = load_teacher(saved(tmp_path, network.state_dict()), {"precision": precision})
    seen: set[torch.dtype] = set()
    assert isinstance(half.network, nn.Module)
    convolution = next(layer for layer in half.network.modules() if isinstance(layer, nn.Conv2d))
    convolution.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
    embeddings = half(images)
    with torch.no_grad():
        full = network(images)
    assert seen == {wanted}
    assert embeddings.dtype == torch.float32
    assert not torch.equal(embeddings, full)
    assert torch.nn.functional.cosine_similarity(embeddings, full).min() > 0.999
    pickle.loads(pickle.dumps(half.network.autocast))


def test_a_named_network_has_to_fit_and_the_misfit_is_told(tmp_path: Path, network: nn.Module) -> None:
    path = saved(tmp_path, network.state_dict())
    with pytest.raises(TeacherError, match=r"does not fit network 'mbf'"):
        load_teacher(path, {"network": "mbf"})
    with pytest.raises(ConfigError, match=r"teacher\.network='r51': no such network; there are r18"):
        load_teacher(path, {"network": "r51"})
    state = dict(network.state_dict())
    name, tensor = next((name, tensor) for name, tensor in state.items() if tensor.dim() == 4)
    with pytest.raises(TeacherError, match=rf"does not fit network '{SMALL}': '{name}' has shape"):
        load_teacher(saved(tmp_path, {**state, name: tensor[:1]}), {"network": SMALL})


def test_a_foreign_checkpoint_names_the_known_networks(tmp_path: Path) -> None:
    path = saved(tmp_path, nn.Linear(3, 4).state_dict())
    with pytest.raises(TeacherError, match=r"none of the networks r18, .*mbf.*'weight' \(4, 3\)"):
        load_teacher(path)


@pytest.mark.parametrize(
    "content", [{}, [], torch.zeros(3), 5, {"a": 1}, {"state_dict": {}}, {1: torch.zeros(1)}, {"a": [torch.zeros(1)]}]
)
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: object) -> None:
    with pytest.raises(TeacherError, match="wanted a state dict"):
        load_teacher(saved(tmp_path, content))


@pytest.mark.parametrize("name", ["complex64", "int8", "uint8", "bool", "int64", "float8_e4m3fn", "float8_e5m2"])
def test_weights_of_a_kind_that_nobody_trains_are_refused(tmp_path: Path, network: nn.Module, name: str) -> None:
    """torch would round or cut them to float32 without a word."""
    state = dict(network.state_dict())
    first = next(iter(state))
    state[first] = state[first].to(getattr(torch, name))
    with pytest.raises(TeacherError, match=rf"tensor '{first}' is of torch\.{name}"):
        load_teacher(saved(tmp_path, state))


def test_a_few_bytes_cannot_stand_for_a_large_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides of zero make any number of weights of one; r18 of 65,536 dimensions takes 6.6 GB."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in get_backbone("mbf", num_features=65536).state_dict().items()}
    monkeypatch.setitem(checkpoint._KNOWN, "mbf", lambda **_: pytest.fail("built"))
    path = saved(tmp_path, {name: torch.ones(1).expand(shape) for name, shape in shapes.items() if len(shape)})
    assert path.stat().st_size < 1 << 20
    with pytest.raises(TeacherError, match=r"tensor '.*' of shape \(.*\) has only 4 bytes"):
        load_teacher(path)


def test_a_long_name_is_cut(tmp_path: Path) -> None:
    for content in ({"a" * 10_000: torch.zeros(1)}, {"a" * 10_000: 5}):
        with pytest.raises(TeacherError, match=r"'a+\.\.\.") as caught:
            load_teacher(saved(tmp_path, content))
        assert len(str(caught.value)) < 600


def test_nan_among_the_weights_is_named(tmp_path: Path, network: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    name = next(name for name, tensor in state.items() if tensor.dim() == 4)
    state[name].view(-1)[5] = float("nan")
    with pytest.raises(TeacherError, match=f"tensor '{name}' holds NaN or inf"):
        load_teacher(saved(tmp_path, state))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_ends_in_one_line(tmp_path: Path, network: nn.Module, share: float, legacy: bool) -> None:
    path = saved(tmp_path, network.state_dict(), _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(TeacherError, match=r"model\.pt") as caught:
        load_teacher(path)
    assert "\n" not in str(caught.value)


def test_a_file_is_taken_by_its_content_before_its_name(tmp_path: Path) -> None:
    assert CheckpointSource.accepts(saved(tmp_path, {"a": torch.zeros(1)}, "teacher.bin"))
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    assert CheckpointSource.accepts(tmp_path / "garbage.pth")
    (tmp_path / "garbage.bin").write_bytes(b"garbage")
    assert not CheckpointSource.accepts(tmp_path / "garbage.bin")
    assert not CheckpointSource.accepts(tmp_path / "missing.pt")
    assert not CheckpointSource.accepts(tmp_path)
    with pytest.raises(TeacherError, match=r"garbage\.pth is a file of 7 bytes.*wanted a PyTorch checkpoint"):
        load_teacher(tmp_path / "garbage.pth")


@pytest.mark.trainer
@pytest.mark.parametrize("name", ["r18", "mbf"])
def test_the_hosts_own_networks_are_recognised(arcface_torch: Path, tmp_path: Path, name: str, images: Tensor) -> None:
    program = f"""
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {str(arcface_torch)!r})
import torch
from backbones import get_model
torch.manual_seed(0)
network = get_model({name!r}, dropout=0.0, fp16=False, num_features=256).eval()
torch.save(network.state_dict(), {str(tmp_path / "model.pt")!r})
images = torch.rand((2, 3, 112, 112), generator=torch.Generator().manual_seed(3)) * 2 - 1
with torch.no_grad():
    torch.save(network(images), {str(tmp_path / "embeddings.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    teacher = load_teacher(tmp_path / "model.pt")
    assert teacher.description.startswith(f"{name} from")
    expected = torch.load(tmp_path / "embeddings.pt", weights_only=True)
    torch.testing.assert_close(teacher(images), expected, rtol=1e-3, atol=1e-3)
