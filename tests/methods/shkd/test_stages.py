"""SH-KD's three runs with the compact trainer: what each is, resuming between and within them, what stops them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from easydict import EasyDict
from torch.utils._python_dispatch import TorchDispatchMode

from arcface_kd.backbones import get_backbone
from arcface_kd.cli.main import main
from arcface_kd.config.arcface_torch import BASE
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.methods.recipe import Stage, recipe_of
from arcface_kd.methods.shkd.method import SHKD
from arcface_kd.system.device import autocast_dtype
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.options import TeacherOptions
from arcface_kd.teachers.student_init import start_from
from arcface_kd.training.stages import train_stages
from arcface_kd.training.trainer import train
from tests.host.trainer.faces import Faces, draw_faces
from tests.networks import tiny, untrained_file
from tests.teachers.onnx_models import face_network
from tests.training import runs

DIMENSION = 16


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=4, images=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that nobody has trained."""
    return untrained_file(tmp_path_factory.mktemp("teacher"), "thin_r10", DIMENSION)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.onnx"
    path.write_bytes(face_network().SerializeToString())
    return path


def config_for(faces: Faces, output: Path, **keys: Any) -> EasyDict:
    own = {"network": "thin_r10", "embedding_size": DIMENSION, "batch_size": 8, "val_targets": [], "kd": "shkd"}
    return runs.config_for(faces, output, **{**own, **keys})


def options(**own: object) -> dict[str, object]:
    return {f"shkd.{name}": value for name, value in own.items()}


LEARNING = options(teacher_epochs=3, teacher_lr=0.05)


def saved(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint_gpu_0.pt", weights_only=True)


def stages_of(config: EasyDict) -> list[Stage]:
    """All three, as if each had been done."""
    made = []
    while (stage := SHKD.next_run(config)) is not None:
        made.append(stage)
        folder = Path(stage.changes["output"])
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"epoch": 99, "state_dict_softmax_fc": {}}, folder / "checkpoint_gpu_0.pt")
    return made


# ---- what each run is


def test_a_whole_run_from_a_checkpoint(faces: Faces, checkpoint: Path, tmp_path: Path) -> None:
    config = config_for(faces, tmp_path / "out", kd_teacher=str(checkpoint), kd_option=LEARNING)
    said: list[str] = []
    result = train_stages(config, lambda stage: said.append(str(stage)))
    first, second, third = (tmp_path / "out" / name for name in ("stage1_student", "stage2_teacher", "."))
    assert said == [
        "shkd: run 1 of 3: the temporary student, thin_r10",
        f"shkd: run 2 of 3: the teacher, thin_r10, starting from {checkpoint}, against the classes of {first}",
        "shkd: run 3 of 3: the final student, thin_r10, distilled by kd from "
        f"{tmp_path / 'out' / 'stage2_teacher' / 'checkpoint_gpu_0.pt'}",
    ]
    assert result.output == tmp_path / "out"
    assert [saved(folder)["epoch"] for folder in (first, second, third)] == [2, 3, 2]
    heads = [saved(folder)["state_dict_softmax_fc"] for folder in (first, second, third)]
    # The first student's classes are learned, the teacher has none of its own, the final student learns its own anew.
    assert heads[0]["methods.classifier.weight"].shape == (4, DIMENSION)
    assert not [name for name in heads[1] if name.startswith("methods")]
    (own,) = [value for name, value in heads[2].items() if name.startswith("methods")]
    assert own.shape == (4, DIMENSION)
    assert not torch.equal(own, heads[0]["methods.classifier.weight"])
    # The teacher has come nearer to the student's classes than the one that was given.
    images = torch.stack([torch.full((3, 112, 112), value) for value in (-0.5, 0.5)])
    before, after = (load_teacher(path)(images) for path in (checkpoint, second / "model.pt"))
    assert not torch.equal(before, after)
    with pytest.raises(ConfigError, match=r"all runs of shkd are done, see .*/out; give another output"):
        train_stages(config)


def test_a_whole_run_from_an_onnx_teacher(faces: Faces, graph: Path, tmp_path: Path) -> None:
    """Its graph is trained and written back; its preprocessing goes along."""
    given = {**LEARNING, "teacher.channels": "bgr", "teacher.mean": "120", "teacher.std": "100"}
    # A cache of the teacher as it was given, which is not the one that the final student learns from.
    cache = tmp_path / "cache"
    cache.write_bytes(b"of another teacher")
    config = config_for(faces, tmp_path / "out", kd_teacher=str(graph), kd_option=given, kd_cache=str(cache))
    stages: list[Stage] = []
    train_stages(config, stages.append)
    second = tmp_path / "out" / "stage2_teacher"
    assert (second / "teacher.cache").stat().st_size == 2 * faces.num_image * DIMENSION * 2
    assert cache.read_bytes() == b"of another teacher"
    assert f"the teacher, onnx, starting from {graph}" in stages[1].title
    kept = stages[2].changes["kd_option"]
    own = {name.partition(".")[2]: value for name, value in kept.items() if name.startswith("teacher.")}
    input_of = TeacherOptions.of(own)
    assert (input_of.channels, input_of.mean, input_of.size) == ("bgr", (120.0,) * 3, 112)
    trained = load_teacher(second / "teacher.onnx", {"channels": "bgr", "mean": 120, "std": 100})
    network, preprocessing = start_from(
        graph, {"channels": "bgr", "mean": 120, "std": 100}, torch.nn.Identity, DIMENSION
    )
    assert preprocessing == trained.preprocessing
    network.load_state_dict(torch.load(second / "model.pt", weights_only=True))
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    torch.testing.assert_close(trained(images), network.eval()(trained.prepare(images)), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(
        trained(images), load_teacher(graph, {"channels": "bgr", "mean": 120, "std": 100})(images)
    )


def test_one_command_without_a_host(
    faces: Faces, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``arcface-kd recipe CONFIG`` and ``arcface-kd train CONFIG`` are one; a method of one run is its one run."""
    keys = {key: value for key, value in config_for(faces, tmp_path / "out").items() if BASE.get(key, "") != value}
    keys |= {"num_epoch": 1, "kd": None}
    lines = ["from easydict import EasyDict", f"config = EasyDict({keys!r})"]
    (tmp_path / "ours.py").write_text("\n".join(lines), encoding="utf-8")
    config = str(tmp_path / "ours.py")
    flags = ["--kd", "shkd", "--kd-teacher", str(checkpoint), "--kd-option", "shkd.teacher_lr=0.05"]
    assert main(["recipe", config, *flags]) == 0
    said = capsys.readouterr().out
    assert [said.count(f"shkd: run {number} of 3") for number in (1, 2, 3)] == [1, 1, 1]
    assert saved(tmp_path / "out")["epoch"] == 1
    assert main(["train", config, *flags]) == 2
    assert "all runs of shkd are done" in capsys.readouterr().err
    assert main(["recipe", config, "--set", f"output={tmp_path / 'alone'}"]) == 0
    assert (tmp_path / "alone" / "model.pt").is_file()


def test_from_scratch_or_given_the_teacher_may_be_a_network_of_the_user_s_own(faces: Faces, tmp_path: Path) -> None:
    own = "python:tests.networks:tiny"
    given = options(teacher_network=own, teacher_batch_size=4)
    config = config_for(faces, tmp_path / "scratch", kd_option=given)
    _, stage, last = stages_of(config)
    assert f"the teacher, {own}, from scratch, against the classes of" in stage.title
    second = stage.changes
    assert (second["network"], second["lr"], second["batch_size"]) == (own, config.lr, 4)
    assert (second["kd"], "student.init" in second["kd_option"]) == ("proxylesskd", False)
    assert last.changes["kd_option"]["teacher.network"] == own
    torch.save(tiny(DIMENSION).state_dict(), tmp_path / "own.pt")
    keys = {"kd_teacher": str(tmp_path / "own.pt"), "kd_option": {"teacher.network": own}}
    second, third = (stage.changes for stage in stages_of(config_for(faces, tmp_path / "given", **keys))[1:])
    assert second["network"] == own
    assert second["kd_option"]["student.init"] == keys["kd_teacher"]
    assert third["kd_option"]["teacher.network"] == own


def test_a_teacher_s_own_order_of_channels_goes_along(faces: Faces, tmp_path: Path) -> None:
    """AdaFace's, for one: the trained file does not say what the given one says."""
    name = "ir:units=1-1-1-1,widths=16-32-48-64,stem=16"
    state = get_backbone(name, num_features=DIMENSION).state_dict()
    torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, tmp_path / "adaface.ckpt")
    config = config_for(faces, tmp_path / "out", kd_teacher=str(tmp_path / "adaface.ckpt"), kd_option=options())
    second, third = (stage.changes for stage in stages_of(config)[1:])
    assert second["network"] == third["kd_option"]["teacher.network"] == name
    assert second["kd_option"]["teacher.channels"] == third["kd_option"]["teacher.channels"] == "bgr"
    given = {key.partition(".")[2]: value for key, value in second["kd_option"].items() if key.startswith("teacher.")}
    network, shown = start_from(
        tmp_path / "adaface.ckpt", given, lambda: get_backbone(name, num_features=DIMENSION), DIMENSION, name=name
    )
    assert shown.channels == "bgr"
    assert torch.equal(network.state_dict()["input_layer.0.weight"], state["input_layer.0.weight"])
    with pytest.raises(TeacherError, match=r"adaface\.ckpt wants bgr"):
        start_from(tmp_path / "adaface.ckpt", None, lambda: network, DIMENSION, name=name)


def test_what_each_run_gets_of_the_config(faces: Faces, checkpoint: Path, tmp_path: Path) -> None:
    given = {
        **options(distil="embedding+rkd", student_epochs=1, teacher_epochs=5, teacher_lr=0.3),
        "teacher.network": "thin_r10",
        "embedding.weight": 32,
    }
    keys = {"kd_teacher": str(checkpoint), "kd_option": given, "kd_cache": "cache", "kd_on_bad_record": "skip"}
    first, second, third = (stage.changes for stage in stages_of(config_for(faces, tmp_path, **keys)))
    assert not [stage for stage in (first, second, third) if "kd_on_bad_record" in stage], "it is that of the config"
    assert [first[key] for key in ("kd", "kd_teacher", "kd_option", "kd_cache", "num_epoch")] == [*[None] * 4, 1]
    assert all(stage["save_all_states"] and not stage["resume"] for stage in (first, second, third))
    assert second["kd_classifier"] == third["kd_classifier"] == first["output"]
    assert second["kd_option"] == {"teacher.network": "thin_r10", "student.init": str(checkpoint)}
    assert (second["kd_teacher"], second["kd_cache"], second["num_epoch"], second["lr"]) == (None, None, 5, 0.3)
    # The cache that was named may be that of the teacher as it was given.
    cache = f"{second['output']}/teacher.cache"
    assert (third["kd"], third["kd_cache"], third["output"]) == ("embedding+rkd", cache, str(tmp_path))
    assert third["kd_option"] == {"teacher.network": "thin_r10", "embedding.weight": 32}
    assert "num_epoch" not in third


def test_a_student_s_classes_that_are_there_spare_the_first_run_and_class_means_do_not(
    faces: Faces, checkpoint: Path, tmp_path: Path
) -> None:
    keys = {"kd_teacher": str(checkpoint)}
    stages = stages_of(config_for(faces, tmp_path / "given", **keys, kd_classifier="somewhere"))
    assert [(stage.number, stage.changes["kd_classifier"]) for stage in stages] == [(2, "somewhere"), (3, "somewhere")]
    assert stages[0].changes["lr"] == pytest.approx(0.01), "a given teacher goes on at a tenth of the rate"
    first, *others = stages_of(config_for(faces, tmp_path / "means", **keys, kd_classifier="class-means"))
    assert "stands in for class-means" in str(first)
    assert [each.changes["kd_classifier"] for each in others] == [first.changes["output"]] * 2


# ---- resuming


@pytest.mark.slow
def test_interrupted_between_and_within_runs_it_goes_on_to_the_same_bytes(
    faces: Faces, checkpoint: Path, tmp_path: Path
) -> None:
    keys = {"kd_teacher": str(checkpoint), "kd_option": LEARNING}
    train_stages(config_for(faces, tmp_path / "whole", **keys))
    config = config_for(faces, tmp_path / "parts", **keys)
    # Between the first and the second run.
    stage = SHKD.next_run(config)
    assert stage is not None
    train(EasyDict({**config, **stage.changes}))

    def interrupt(epoch: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    numbers: list[tuple[int, bool]] = []

    def note(stage: Stage) -> None:
        numbers.append((stage.number, stage.changes["resume"]))

    # Within the second.
    with pytest.raises(KeyboardInterrupt):
        train_stages(config, note, interrupt)
    train_stages(config, note)
    assert numbers == [(2, False), (2, True), (3, False)]
    for name in ("stage1_student", "stage2_teacher", "."):
        whole, parts = (tmp_path / folder / name / "model.pt" for folder in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), name


# ---- what stops it


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "--kd-teacher FILE, or .*teacher_network=r50"),
        (options(teacher_network="r51"), "shkd.teacher_network is 'r51'; .* r18, "),
        ({**options(teacher_network="r50"), "teacher.channels": "bgr"}, "teacher.channels belongs to"),
        (options(teacher="r50"), r"shkd.teacher; .* 'shkd.teacher_lr'\?"),
        (options(distil="kdd"), "no method named 'kdd'"),
        ({"gkd.temperature": 2}, "unknown option 'gkd.temperature'"),
        ({**options(distil="embedding"), "embedding.wait": 2}, "unknown option embedding.wait"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_run(
    faces: Faces, tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        SHKD.next_run(config_for(faces, tmp_path / "out", kd_option=given))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_does_not_fit_is_said_before_the_first_run(
    faces: Faces, checkpoint: Path, tmp_path: Path
) -> None:
    cases: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (checkpoint, {"embedding_size": 32}, TeacherError, "set embedding_size=16"),
        (checkpoint, {"kd_option": options(teacher_network="mbf")}, ConfigError, "'mbf', and .* is 'thin_r10'"),
        (tmp_path / "none.pt", {}, TeacherError, "none.pt"),
    ]
    for teacher, keys, kind, named in cases:
        with pytest.raises(kind, match=named):
            SHKD.next_run(config_for(faces, tmp_path / "out", kd_teacher=str(teacher), **keys))
    assert not (tmp_path / "out").exists()


def test_runs_of_other_settings_are_not_joined(faces: Faces, checkpoint: Path, tmp_path: Path) -> None:
    keys = {"kd_teacher": str(checkpoint)}
    stages_of(config_for(faces, tmp_path, **keys))
    assert set(json.loads((tmp_path / "shkd.json").read_text())) == {"1", "2", "3"}
    assert SHKD.next_run(config_for(faces, tmp_path, **keys)) is None
    with pytest.raises(ConfigError, match=r"run 1 .*stage1_student was begun with lr=0.1, and is now .* 0.2"):
        SHKD.next_run(config_for(faces, tmp_path, lr=0.2, **keys))
    # What does not decide how a run comes out may change.
    assert SHKD.next_run(config_for(faces, tmp_path, frequent=7, num_workers=1, **keys)) is None
    (tmp_path / "shkd.json").unlink()
    with pytest.raises(ConfigError, match="stage1_student holds the checkpoints of another run"):
        SHKD.next_run(config_for(faces, tmp_path, **keys))


def test_joined_with_another_method_or_as_one_run_it_is_refused(faces: Faces, checkpoint: Path, tmp_path: Path) -> None:
    assert recipe_of({"kd": "shkd"}) is SHKD
    assert recipe_of({"kd": "adadistill"}) is None
    assert recipe_of({"kd": None}) is None
    for kd in ("shkd+embedding", "embedding+shkd"):
        with pytest.raises(ConfigError, match="shkd is 3 runs and does not combine"):
            recipe_of({"kd": kd})
    with pytest.raises(ConfigError, match=r"shkd is 3 runs, .* `arcface-kd recipe`"):
        train(config_for(faces, tmp_path, kd_teacher=str(checkpoint)))


# ---- starting from a file, with any method


@pytest.mark.parametrize(
    ("network", "size", "said"),
    [("thin_r10", 8, "set embedding_size=16"), ("mobilefacenet", DIMENSION, "teacher.pt does not fit")],
)
def test_a_start_of_another_dimension_or_network_is_refused(
    checkpoint: Path, network: str, size: int, said: str
) -> None:
    with pytest.raises(TeacherError, match=said):
        start_from(checkpoint, None, lambda: get_backbone(network, num_features=size), size)


def test_a_graph_trains_as_a_student_of_its_own_preprocessing(faces: Faces, graph: Path, tmp_path: Path) -> None:
    """It sees what it is used to, verification included; its state has no other names."""
    keys: dict[str, Any] = {
        "kd": "proxylesskd",
        "kd_classifier": str(tmp_path / "head.pt"),
        "kd_option": {"student.init": str(graph), "teacher.channels": "bgr", "teacher.std": "64"},
        "val_targets": ["pairs"],
        "lr": 1e-12,
        "weight_decay": 0.0,
        "num_epoch": 1,
    }
    torch.save(torch.randn(4, DIMENSION), tmp_path / "head.pt")
    result = train(config_for(faces, tmp_path / "out", **keys))
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    wanted = load_teacher(graph, {"channels": "bgr", "std": 64})(images)
    with torch.no_grad():
        torch.testing.assert_close(result.student(images), wanted, rtol=1e-3, atol=1e-4)
    assert all(name.startswith("weights.") for name in torch.load(tmp_path / "out" / "model.pt", weights_only=True))
    assert np.isfinite(result.verification["pairs"].accuracy)


def test_a_graph_trains_in_the_narrow_format_up_to_its_embedding_layer(graph: Path) -> None:
    def products_of(*, fp16: bool) -> tuple[torch.Tensor, set[tuple[object, torch.dtype]], list[torch.Tensor]]:
        network, _ = start_from(graph, None, torch.nn.Identity, DIMENSION, fp16=fp16)
        seen: set[tuple[object, torch.dtype]] = set()

        class Formats(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func in (torch.ops.aten.convolution.default, torch.ops.aten.mm.default):
                    seen.add((func, args[0].dtype))
                return func(*args, **(kwargs or {}))

        with Formats(), torch.autocast("cpu", torch.bfloat16):
            # What is around the network does not count.
            embeddings = network(images)
        embeddings.square().sum().backward()
        return (
            embeddings.detach(),
            seen,
            [parameter.grad for parameter in network.parameters() if parameter.grad is not None],
        )

    images = torch.rand(4, 3, 112, 112) * 2 - 1
    wanted, formats, gradients = products_of(fp16=False)
    assert {dtype for _, dtype in formats} == {torch.float32}
    found, formats, narrow_gradients = products_of(fp16=True)
    narrow = autocast_dtype(images.device) or torch.float32
    assert formats == {(torch.ops.aten.convolution.default, narrow), (torch.ops.aten.mm.default, torch.float32)}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))
    assert len(narrow_gradients) == len(gradients) > 0
    assert all(gradient.isfinite().all() for gradient in narrow_gradients)
