"""What the host offers, with distillation on: each of its settings in a run of a few steps on two ranks.

Needs ARCFACE_TORCH. All runs share two processes, see ``in_turn.py``; ``docs/host.md`` lists them.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from arcface_kd.backbones import get_backbone
from arcface_kd.checkpoints.shards import open_shards
from arcface_kd.data.dataset import open_dataset
from arcface_kd.data.pack import pack_folder
from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.methods.class_centers import initial_centers
from tests.compatibility.same_losses import losses_of
from tests.host.trainer.faces import Faces, draw_faces
from tests.host.trainer.host import checkout, settings
from tests.host.trainer.launch import Run, Turn, head_state, launch_in_turn, write_config
from tests.host.trainer.teacher import Teacher, untrained_teacher

pytestmark = [pytest.mark.trainer, pytest.mark.slow]

RANKS, BATCH, DIMENSION = 2, 4, 64
CENTERS = "methods.adadistill.centers.weight"
ADADISTILL = ("--kd", "adadistill")
PROJECTION = ("--kd-option", "student.projection=linear")
# Twice the images in one epoch make the schedule of a run of two; the data set decides where the epoch ends.
INTERRUPTED = {"num_image": 64, "batch_size": 4}


class Setting(NamedTuple):
    """The keys that make a setting, over those of every run, its flags, and stand-ins for what a CPU lacks."""

    keys: dict[str, Any]
    flags: tuple[str, ...] = ADADISTILL
    stand_ins: tuple[str, ...] = ()


SETTINGS = {
    "records": Setting({}),
    "folder": Setting({"rec": "FOLDER"}),
    "two_sets": Setting({"rec": ["FIRST_HALF", "SECOND_HALF"]}),
    "synthetic": Setting({"rec": "synthetic"}, stand_ins=("short_synthetic",)),
    "sampled": Setting({"sample_rate": 0.5}),
    "filtered": Setting({"interclass_filtering_threshold": 0.05}),
    "fp16": Setting({"fp16": True}, stand_ins=("cpu_amp",)),
    "adamw": Setting({"optimizer": "adamw", "lr": 1e-3}),
    "accumulated": Setting({"optimizer": "adamw", "lr": 1e-3, "gradient_acc": 2}),
    "projected": Setting({"embedding_size": 512}, (*ADADISTILL, *PROJECTION)),
    "cached": Setting({}, (*ADADISTILL, "--kd-cache", "CACHE")),
    "degraded": Setting({}, (*ADADISTILL, "--kd-cache", "DEGRADED", "--kd-option", "student.augment=crop:1")),
    "adaface": Setting({}, (*ADADISTILL, "--kd-option", "head.margin=adaface")),
    "dali": Setting({"dali": True}, stand_ins=("dali",)),
    "one_image": Setting({"batch_size": 1}, stand_ins=("no_batch_norm",)),
    "one_image_dali": Setting({"batch_size": 1, "dali": True}, stand_ins=("no_batch_norm", "dali_squeezed")),
    "frozen": Setting({}, ("--kd", "proxylesskd", "--kd-classifier", "CLASSIFIER")),
    **{
        f"{method}_{part}": Setting({**keys, "embedding_size": 32}, ("--kd", method, *PROJECTION), ("no_batch_norm",))
        for method in ("adadistill", "embedding")
        for part, keys in {"whole": {"num_epoch": 2}, "half": INTERRUPTED}.items()
    },
}


class Host(NamedTuple):
    """Where the runs have left their files, and what they printed."""

    folder: Path
    outputs: Path
    run: Run

    def output(self, name: str, ranks: int = RANKS) -> Path:
        """The output folder of a run that has come to its end on all ranks."""
        done = [f"finished {name} on rank {rank}" in self.run.printed for rank in range(ranks)]
        assert all(done), f"{name} has not finished: {self.run.printed[-6000:]}"
        return self.outputs / name

    def losses(self, name: str) -> dict[int, float]:
        losses = losses_of(self.output(name))
        assert np.isfinite(list(losses.values())).all(), losses
        return losses


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=32, images=1)


@pytest.fixture(scope="module")
def teacher(faces: Faces, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return untrained_teacher(faces, tmp_path_factory.mktemp("teacher") / "model.pt", DIMENSION)


@pytest.fixture(scope="module")
def words(faces: Faces, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files that settings name by a word in capitals."""
    folder = tmp_path_factory.mktemp("files")
    records = open_dataset(faces.folder)
    for at in range(faces.num_image):
        person = folder / "people" / f"person_{records.label(at):02}"
        person.mkdir(parents=True, exist_ok=True)
        (person / f"{at:03}.jpg").write_bytes(records.image_bytes(at))
        half = folder / ("first" if 2 * at < faces.num_image else "second") / person.name
        shutil.copytree(person, half)
    pack_folder(folder / "second", folder / "packed")
    # With one image of each identity they are its class centers.
    torch.save({"weight": teacher.embeddings}, folder / "classifier.pt")
    return {
        "FOLDER": str(folder / "people"),
        "FIRST_HALF": str(folder / "first"),
        "SECOND_HALF": str(folder / "packed"),
        "CACHE": str(folder / "cache"),
        "DEGRADED": str(folder / "degraded"),
        "CLASSIFIER": str(folder / "classifier.pt"),
    }


def turn(host: Path, outputs: Path, faces: Faces, teacher: Teacher, words: dict[str, str], name: str) -> Turn:
    """A setting as a run: its config is written into the host's folder."""
    setting = SETTINGS[name]
    keys = {"batch_size": BATCH, "embedding_size": DIMENSION, "num_workers": 0, **setting.keys}
    keys = {key: words.get(value, value) if isinstance(value, str) else value for key, value in keys.items()}
    if isinstance(keys.get("rec"), list):
        keys["rec"] = [words[word] for word in keys["rec"]]
    config = write_config(host, name, settings(faces, outputs / name, **keys))
    flags = [words.get(flag, flag) for flag in setting.flags]
    return Turn(name, [f"configs/{config}", *flags, *teacher.arguments], setting.stand_ins)


@pytest.fixture(scope="module")
def host(
    arcface_torch: Path,
    faces: Faces,
    teacher: Teacher,
    words: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Host:
    """All settings, one after the other."""
    folder = checkout(
        arcface_torch, tmp_path_factory.mktemp("host") / "arcface_torch", "kd_flag", "current_stack", "cpu_gloo"
    )
    outputs = tmp_path_factory.mktemp("outputs")
    turns = [turn(folder, outputs, faces, teacher, words, name) for name in SETTINGS]
    return Host(folder, outputs, launch_in_turn(folder, turns, ranks=RANKS, torchrun=True))


@pytest.fixture(scope="module")
def resumed(host: Host, faces: Faces, teacher: Teacher, words: dict[str, str]) -> Host:
    """What two ranks have begun goes on with one, which takes the batches of both."""
    turns = [
        turn(host.folder, host.outputs, faces, teacher, words, f"{method}_half")._replace(name=f"{method}_resumed")
        for method in ("adadistill", "embedding")
        if host.output(f"{method}_half")
    ]
    for each in turns:
        path = host.folder / f"{each.arguments[0]}.py"
        changes = {"resume": True, "num_epoch": 2, "batch_size": RANKS * BATCH, "num_image": faces.num_image}
        path.write_text(path.read_text(encoding="utf-8") + f"config.update({changes!r})\n", encoding="utf-8")
    return host._replace(run=launch_in_turn(host.folder, turns))


@pytest.mark.parametrize("name", [name for name in SETTINGS if "one_image" not in name])
def test_every_setting_trains_and_leaves_its_files(host: Host, faces: Faces, name: str) -> None:
    keys = SETTINGS[name].keys
    output, losses = host.output(name), host.losses(name)
    steps = faces.num_image // (RANKS * BATCH) * keys.get("num_epoch", 1)
    # The host's log leaves out a run's first step.
    assert sorted(losses) == list(range(2, steps + 1))
    assert len(set(losses.values())) == len(losses)
    student = torch.load(output / "model.pt", weights_only=True)
    assert not [entry for entry in student if "projection" in entry or "centers" in entry]
    if "no_batch_norm" not in SETTINGS[name].stand_ins:
        get_backbone("mbf", num_features=keys.get("embedding_size", DIMENSION)).load_state_dict(student)
    assert [head_state(output, rank)["class_range"].tolist() for rank in range(RANKS)] == [[0, 16, 32], [16, 32, 32]]
    assert {int(head_state(output, rank)["step"]) for rank in range(RANKS)} == {steps}
    if CENTERS in head_state(output):
        centers = torch.cat([head_state(output, rank)[CENTERS] for rank in range(RANKS)])
        moved = (centers - initial_centers(ClassShard(32), DIMENSION, 2048)).norm(dim=1) > 0.05
        assert moved.tolist() == [name != "synthetic" or label == 1 for label in range(32)]


@pytest.mark.parametrize("name", ["folder", "two_sets", "dali"])
def test_the_same_images_by_another_way_give_the_same_losses(host: Host, name: str) -> None:
    assert host.losses(name) == host.losses("records")
    assert (host.output(name) / "model.pt").read_bytes() == (host.output("records") / "model.pt").read_bytes()


def test_a_batch_of_one_image_on_each_rank(host: Host, faces: Faces) -> None:
    """Its label comes as (1,) from our loader and without any dimension from the host's DALI wrapper."""
    losses = host.losses("one_image")
    assert sorted(losses) == list(range(2, faces.num_image // RANKS + 1))
    assert losses == host.losses("one_image_dali")


def test_fewer_classes_in_the_sum_make_a_smaller_loss(host: Host) -> None:
    """By sampling, and by leaving out those that are too close."""
    first = host.losses("records")[2]
    assert host.losses("sampled")[2] < first
    assert host.losses("filtered")[2] < first


def test_fp16_is_near_fp32_and_its_scale_is_used(host: Host) -> None:
    narrow, exact = (losses_of(host.output(name), "kd/ce")[1] for name in ("fp16", "records"))
    assert narrow != exact
    assert narrow == pytest.approx(exact, rel=0.02)
    log = (host.output("fp16") / "training.log").read_text(encoding="utf-8")
    assert log.count("Fp16 Grad Scale: 64 ") == len(host.losses("fp16")), "no step was left out"


def test_accumulation_steps_the_optimiser_every_other_time(host: Host, faces: Faces) -> None:
    steps = faces.num_image // (RANKS * BATCH)
    for name, wanted in {"adamw": steps, "accumulated": steps // 2}.items():
        state = torch.load(host.output(name) / "checkpoint_gpu_0.pt", weights_only=True)["state_optimizer"]["state"]
        assert {int(entry["step"]) for entry in state.values()} == {wanted}


def test_the_ranks_share_one_projection(host: Host) -> None:
    projections = [head_state(host.output("projected"), rank)["projection.weight"] for rank in range(RANKS)]
    assert projections[0].shape == (DIMENSION, 512)
    assert torch.equal(*projections), "its gradients are averaged over ranks"
    # It began with orthogonal rows.
    assert float((projections[0] @ projections[0].T - torch.eye(DIMENSION)).abs().max()) > 1e-4


def test_a_cache_changes_no_more_than_its_rounding(host: Host, words: dict[str, str]) -> None:
    assert Path(words["CACHE"]).stat().st_size > 0
    cached, asked = host.losses("cached"), host.losses("records")
    assert cached != asked
    assert cached[2] == pytest.approx(asked[2], rel=1e-3)


def test_a_degraded_student_s_teacher_sees_clean_images(host: Host, words: dict[str, str]) -> None:
    assert Path(words["DEGRADED"]).read_bytes() == Path(words["CACHE"]).read_bytes()
    assert not set(host.losses("degraded").values()) & set(host.losses("cached").values())


def test_adaface_s_statistics_are_those_of_all_ranks(host: Host) -> None:
    assert not set(host.losses("adaface").values()) & set(host.losses("records").values())
    states = [head_state(host.output("adaface"), rank) for rank in range(RANKS)]
    mean, std = (torch.stack([state[f"quality.{name}"] for state in states]) for name in ("mean", "std"))
    assert mean[0] == mean[1] != 20
    assert std[0] == std[1] != 100


def test_a_frozen_classifier_is_not_saved_with_the_run(host: Host) -> None:
    assert not [entry for entry in head_state(host.output("frozen")) if entry.startswith("methods.")]
    first, distilled = (losses_of(host.output(name), "kd/ce")[1] for name in ("frozen", "records"))
    assert first != pytest.approx(distilled, rel=1e-3)


@pytest.mark.parametrize("method", ["adadistill", "embedding"])
def test_one_rank_takes_up_what_two_have_left(host: Host, resumed: Host, method: str) -> None:
    """Student, centers or classifier, projection and all momentum: as if the run had not been interrupted."""
    straight = host.losses(f"{method}_whole")
    resumed.output(f"{method}_resumed", ranks=1)
    output = host.outputs / f"{method}_half"
    kept = losses_of(output)
    # The host's log leaves out the first step of each run, and averages it into the second.
    seen = sorted(set(kept) - {6})
    assert seen == [2, 3, 4, 7, 8]
    assert [kept[step] for step in seen] == pytest.approx([straight[step] for step in seen], rel=1e-3)
    whole, halves = (
        torch.load(folder / "model.pt", weights_only=True) for folder in (host.output(f"{method}_whole"), output)
    )
    for entry, value in whole.items():
        torch.testing.assert_close(halves[entry], value, rtol=1e-2, atol=1e-4)
    assert (CENTERS if method == "adadistill" else "methods.classifier.weight") in head_state(output)
    centers = [open_shards(folder).class_centers(0, 32) for folder in (host.output(f"{method}_whole"), output)]
    torch.testing.assert_close(centers[1], centers[0], rtol=1e-2, atol=1e-4)
