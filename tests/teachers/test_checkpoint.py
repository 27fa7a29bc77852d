import io
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arcface_kd.backbones import NETWORKS, get_backbone
from arcface_kd.backbones.vit import VITS
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.teachers import Preprocessing, checkpoint, load_teacher
from arcface_kd.teachers.checkpoint import CheckpointSource, is_run_folder, load_network, read_state

SMALL = "thin_r18"
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


def saved(folder: Path, content: object, name: str = "model.pt", **options: Any) -> Path:
    path = folder / name
    torch.save(content, path, **options)
    return path


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


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
@pytest.mark.parametrize("num_features", [512, 128])
def test_name_and_dimension_are_inferred_from_names_and_shapes(name: str, num_features: int) -> None:
    from arcface_kd.teachers import checkpoint

    with torch.device("meta"):
        state = {**NETWORKS, **VITS}[name](num_features=num_features).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    fitting = {
        other: size for other in checkpoint._KNOWN if (size := checkpoint._num_features(other, shapes)) is not None
    }
    assert fitting == {name: num_features}


def test_every_shape_of_checkpoint_holds_the_same_teacher(tmp_path: Path, network: nn.Module) -> None:
    state = network.state_dict()
    without_counters = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    host = {
        "epoch": 3,
        "global_step": 100,
        "state_dict_backbone": state,
        "state_dict_softmax_fc": {"weight": torch.zeros(7, SIZE)},
        "state_optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "state_lr_scheduler": {"base_lrs": [0.1], "last_epoch": 3},
    }
    contents = {
        "plain": state,
        "ddp": prefixed(state, "module."),
        "compiled": prefixed(state, "_orig_mod."),
        "compiled ddp": prefixed(state, "module._orig_mod."),
        "without counters": without_counters,
        "host": host,
        "nested": {"state_dict": prefixed(state, "module."), "epoch": 1},
    }
    fingerprints = {}
    for name, content in contents.items():
        fingerprints[name] = load_teacher(saved(tmp_path, content)).fingerprint
    fingerprints["legacy"] = load_teacher(
        saved(tmp_path, state, "legacy.pth", _use_new_zipfile_serialization=False)
    ).fingerprint
    assert len(set(fingerprints.values())) == 1, fingerprints


def test_a_run_s_folder_stands_for_its_student(tmp_path: Path, network: nn.Module) -> None:
    path = saved(tmp_path, network.state_dict())
    # Older versions of arcface_torch leave it there; it may be of another epoch.
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07")
    teacher = load_teacher(tmp_path)
    assert teacher.fingerprint == load_teacher(path).fingerprint
    assert load_network(tmp_path).digest == load_network(path).digest
    assert is_run_folder(tmp_path)
    assert is_run_folder(str(tmp_path))
    for other in (path, tmp_path / "none", "timm:vit", network, None):
        assert not is_run_folder(other)
    path.write_bytes(b"damaged")
    with pytest.raises(TeacherError, match=r"model.pt"):
        load_teacher(tmp_path)


def test_other_weights_are_another_teacher(tmp_path: Path, network: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first = load_network(saved(tmp_path, state)).digest
    name = next(iter(state))
    state[name].view(-1)[0] += 1e-3
    assert load_network(saved(tmp_path, state)).digest != first


def test_float16_weights_are_computed_with_in_float32(tmp_path: Path, network: nn.Module, images: Tensor) -> None:
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in network.state_dict().items()
    }
    teacher = load_teacher(saved(tmp_path, halves))
    assert {parameter.dtype for parameter in load_network(tmp_path / "model.pt").network.parameters()} == {
        torch.float32
    }
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), network(images), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_reaches_the_convolutions_of_a_backbone(
    tmp_path: Path, network: nn.Module, images: Tensor, precision: str
) -> None:
    path = saved(tmp_path, network.state_dict())
    plain, half = load_teacher(path), load_teacher(path, {"precision": precision})
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    seen: set[torch.dtype] = set()
    module = half.network
    assert isinstance(module, nn.Module)
    convolution = next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
    convolution.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
    embeddings = half(images)
    assert seen == {wanted}
    assert embeddings.dtype == torch.float32
    assert not torch.equal(embeddings, plain(images))
    assert torch.nn.functional.cosine_similarity(embeddings, plain(images)).min() > 0.999
    pickle.loads(pickle.dumps(half.network.autocast))  # type: ignore[attr-defined]


def test_a_named_network_has_to_fit_and_the_misfit_is_told(tmp_path: Path, network: nn.Module) -> None:
    path = saved(tmp_path, network.state_dict())
    assert load_teacher(path, {"network": SMALL}).embedding_size == SIZE
    with pytest.raises(TeacherError, match=r"does not fit network 'mbf': \d+ tensors missing.*foreign"):
        load_teacher(path, {"network": "mbf"})
    with pytest.raises(ConfigError, match=r"teacher\.network='r51': no such network; there are r18"):
        load_teacher(path, {"network": "r51"})
    state = dict(network.state_dict())
    name = next(name for name, tensor in state.items() if tensor.dim() == 4)
    state[name] = state[name][:1]
    with pytest.raises(TeacherError, match=rf"does not fit network '{SMALL}': '{name}' has shape"):
        load_teacher(saved(tmp_path, state), {"network": SMALL})


def test_a_foreign_checkpoint_names_the_known_networks(tmp_path: Path) -> None:
    path = saved(tmp_path, nn.Linear(3, 4).state_dict())
    with pytest.raises(
        TeacherError, match=r"2 tensors \(the first: 'weight' \(4, 3\)\).*none of the networks r18, .*mbf"
    ):
        load_teacher(path)


@pytest.mark.parametrize(
    "content", [{}, [], torch.zeros(3), 5, {"a": 1}, {"state_dict": {}}, {1: torch.zeros(1)}, {"a": [torch.zeros(1)]}]
)
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: object) -> None:
    with pytest.raises(TeacherError, match="wanted a state dict: tensors by name"):
        load_teacher(saved(tmp_path, content))


def test_tensors_that_are_not_dense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="not a plain dense tensor"):
        read_state(saved(tmp_path, {"a": torch.eye(3).to_sparse()}))


@pytest.mark.parametrize("name", ["complex64", "int8", "uint8", "bool", "int64", "float8_e4m3fn", "float8_e5m2"])
def test_weights_of_a_kind_that_nobody_trains_are_refused(tmp_path: Path, network: nn.Module, name: str) -> None:
    """torch would round or cut them to float32 without a word."""
    state = dict(network.state_dict())
    first = next(iter(state))
    state[first] = state[first].to(getattr(torch, name))
    with pytest.raises(TeacherError, match=rf"tensor '{first}' is of torch\.{name}; wanted float16, bfloat16"):
        load_teacher(saved(tmp_path, state))


def test_a_few_bytes_cannot_stand_for_a_large_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides of zero make any number of weights of one; r18 of 65,536 dimensions takes 6.6 GB."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in get_backbone("mbf", num_features=65536).state_dict().items()}
    monkeypatch.setitem(checkpoint._KNOWN, "mbf", lambda **_: pytest.fail("built"))
    path = saved(tmp_path, {name: torch.ones(1).expand(shape) for name, shape in shapes.items() if len(shape)})
    assert path.stat().st_size < 1 << 20
    with pytest.raises(TeacherError, match=r"tensor '.*' of shape \(.*\) has only 4 bytes in the file"):
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


class Malicious:
    """Runs a command when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return subprocess.call, ([sys.executable, "-c", f"open({str(self.mark)!r}, 'w')"],)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_checkpoint_runs_nothing(tmp_path: Path, legacy: bool) -> None:
    mark = tmp_path / "mark"
    path = saved(tmp_path, {"a": Malicious(mark)}, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(TeacherError, match="holds more than tensors, and loading it could run code") as caught:
        load_teacher(path)
    assert not mark.exists()
    assert "\n" not in str(caught.value)


def test_a_malicious_plain_pickle_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps({"a": Malicious(mark)}, protocol=2))
    with pytest.raises(TeacherError):
        load_teacher(path)
    assert not mark.exists()


def test_a_verification_set_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "lfw.bin"
    path.write_bytes(pickle.dumps(([b"jpeg"] * 2, [True]), protocol=2))
    with pytest.raises(TeacherError, match="damaged or not a PyTorch checkpoint"):
        load_teacher(path)


def test_a_whole_pickled_module_asks_for_its_state_dict(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"save its state_dict\(\)"):
        load_teacher(saved(tmp_path, nn.Linear(2, 2)))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_ends_in_one_line(tmp_path: Path, network: nn.Module, share: float, legacy: bool) -> None:
    path = saved(tmp_path, network.state_dict(), _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(TeacherError, match=r"model\.pt") as caught:
        load_teacher(path)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_a_weight_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.arange(1000.0)})
    content = bytearray(path.read_bytes())
    content[content.find(torch.arange(1000.0).numpy().tobytes()) + 402] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(TeacherError, match=r"checksum of record '.*data/0' is wrong"):
        read_state(path)


def _rezipped(path: Path, compression: int = zipfile.ZIP_STORED, replace: Mapping[bytes, bytes] | None = None) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            for old, new in (replace or {}).items():
                content = content.replace(old, new) if name.endswith("data.pkl") else content
            archive.writestr(name, content)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.zeros(100_000)})
    _rezipped(path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    with pytest.raises(TeacherError, match=r"is compressed, which torch\.save never does"):
        read_state(path)


@pytest.mark.parametrize("claimed", [b"J\x00\x00\x00\x10", b"J\xff\xff\xff\x7f"])
def test_a_tensor_larger_than_its_record_is_refused(tmp_path: Path, claimed: bytes) -> None:
    path = saved(tmp_path, {"a": torch.zeros(1000)})
    _rezipped(path, replace={b"M\xe8\x03": claimed})
    with pytest.raises(TeacherError, match="damaged or not a PyTorch checkpoint"):
        read_state(path)


def test_a_zip_that_is_no_checkpoint_says_what_it_may_be(tmp_path: Path) -> None:
    path = tmp_path / "buffalo_l.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w600k_r50.onnx", b"x")
    with pytest.raises(TeacherError, match=r"an InsightFace pack\? unpack it"):
        load_teacher(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", b"x")
    with pytest.raises(TeacherError, match=r"no data\.pkl in it"):
        load_teacher(path)


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


def test_mangled_files_end_in_an_error_of_ours(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"a": torch.arange(10.0), "b": torch.ones(2, 2)}, stream)
    whole = stream.getvalue()
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "model.pt"
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for place, value in torch.randint(0, 1 << 30, (2, 2), generator=generator).tolist():
            content[place % len(content)] = value % 256
        path.write_bytes(bytes(content))
        try:
            state = read_state(path)
        except TeacherError:
            refused += 1
        else:
            assert all(isinstance(tensor, Tensor) for tensor in state.values())
    assert refused > 150


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
