"""Degraded students: what their teacher is shown, what is refused, and that nothing else of a run changes."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from arcface_kd.config.kd import KDConfig
from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.loader import FaceLoader
from arcface_kd.data.sampler import ViewSampler
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.drop_ins import drop_ins
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import CheckpointError, ConfigError
from arcface_kd.methods.base import Batch
from arcface_kd.methods.shkd.method import SHKD
from tests.distillation.test_cached_distillation import DIMENSION, Network, distil, teacher_of
from tests.host.trainer.faces import Faces
from tests.reference.problems import ARCFACE
from tests.test_docs import PAGES, own_methods, rows, section
from tests.training.runs import config_for

Options = dict[str, dict[str, object]]
QUALITY: Options = {"student": {"augment": "quality"}}
MIXED: Options = {"student": {"augment": "strong", "augment.teacher": "same"}}
WITHOUT_LABELS: Options = {"embedding": {"labels": "none"}}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_clean_teacher_says_what_it_says_of_images_that_are_not_degraded(
    faces: Faces, tmp_path: Path, workers: int
) -> None:
    """To the last bit: running on the clean images, filling a cache and reading it."""
    plain = distil(faces, teacher_of(Network(1, rounded=True)), None)
    online = distil(faces, teacher_of(Network(1, rounded=True)), None, options=QUALITY, workers=workers)
    cache, network = tmp_path / "rows", Network(1)
    filling = distil(faces, teacher_of(network), cache, options=QUALITY, workers=workers)
    filled = distil(faces, teacher_of(network), cache, options=QUALITY, workers=workers)
    assert network.shown == 0
    assert plain.views == online.views
    assert torch.equal(plain.teacher, online.teacher)
    assert not set(plain.losses) & set(online.losses)
    for cached in (filling, filled):
        assert torch.equal(cached.teacher, filled.teacher)
        assert (cached.teacher - online.teacher).abs().max() < 1e-6
        assert cached.losses == online.losses
    # The rows are those that a run without degraded images reads.
    assert distil(faces, teacher_of(network), cache).losses == plain.losses
    assert network.shown == 0


def test_a_resumed_run_sees_the_same_views(faces: Faces, tmp_path: Path) -> None:
    whole = distil(faces, teacher_of(Network(1)), None, epochs=range(3), options=QUALITY)
    state: dict[str, Any] = {}
    first = distil(faces, teacher_of(Network(1)), None, epochs=range(1), resume=state, options=QUALITY)
    then = distil(faces, teacher_of(Network(1)), None, epochs=range(1, 3), resume=state, workers=1, options=QUALITY)
    assert first.losses + then.losses == whole.losses


def _wired(faces: Faces, options: Options, kd: str = "embedding") -> tuple[Any, ...]:
    """A loader, a student, its teacher's network and a head."""
    network = Network(1)
    distiller = Distiller(KDConfig(tuple(kd.split("+")), options=options), teacher_of(network))
    dataset = RecordDataset(faces.folder)
    loader = FaceLoader(dataset, batch_size=9, sampler=ViewSampler(len(dataset), seed=4), num_workers=0)
    distiller.use_cache(loader)
    student = distiller.watch(Network(seed=2))
    head = DistillationHead(distiller, ARCFACE, DIMENSION, faces.num_classes, ranks=RankGroup(alone=True))
    return loader, student, network, head


@pytest.mark.parametrize("view", ["clean", "same"])
def test_the_gradient_is_that_of_student_and_teacher_on_their_own_views(faces: Faces, view: str) -> None:
    student_options: dict[str, object] = {"augment": "crop:0.5,lowres:0.5", "augment.teacher": view}
    loader, student, network, head = _wired(faces, {"student": student_options, **WITHOUT_LABELS})
    flipped, *_ = _wired(faces, WITHOUT_LABELS)
    for (images, labels), (clean, _) in zip(loader, flipped, strict=True):
        assert not torch.equal(images, clean)
        student.zero_grad()
        head(student(images), labels).backward()
        twin = Network(seed=2)
        with torch.no_grad():
            said = normalize(network(clean if view == "clean" else images))
        (64 * (normalize(twin(images)) - said).square().sum(1).mean()).backward()
        torch.testing.assert_close(student.weight.grad, twin.weight.grad, rtol=1e-5, atol=1e-7)


def test_a_mixture_is_shown_to_both_and_has_no_label(faces: Faces) -> None:
    loader, student, network, head = _wired(faces, MIXED | WITHOUT_LABELS)
    met: list[Batch] = []
    head.methods["embedding"].register_forward_pre_hook(lambda method, arguments: met.append(arguments[0]))
    for images, labels in loader:
        head(student(images), labels).backward()
        with torch.no_grad():
            torch.testing.assert_close(met[-1].teacher, normalize(network(images)))
        assert torch.equal(met[-1].labels, labels)
    assert 0 < sum(int((batch.labels < 0).sum()) for batch in met) < 45


def test_the_run_says_what_a_teacher_in_each_step_costs(faces: Faces, caplog: pytest.LogCaptureFixture) -> None:
    loader, student, *_, head = _wired(faces, MIXED)
    with caplog.at_level(logging.INFO):
        for images, labels in loader:
            head(student(images), labels)
    (told,) = [record.getMessage() for record in caplog.records if "augment.teacher=same" in record.getMessage()]
    assert re.search(r"\d+ ms for 9 images", told)


@pytest.mark.parametrize(
    ("kd", "options", "keys", "named"),
    [
        ("embedding", {"augment.teacher": "same"}, {"cache": "rows"}, "kd_cache=rows"),
        ("kd", {"augment.teacher": "same"}, {"cache": "rows", "classifier": "class-means"}, "class-means"),
        ("adadistill", {"augment.teacher": "same"}, {}, "adadistill"),
        ("adadistill+embedding", {"augment": "strong", "augment.teacher": "same"}, {}, "adadistill"),
        ("tcs", {"augment": "quality", "augment.teacher": "same"}, {"cache": "rows"}, "tcs"),
        ("embedding", {"augment": "strong"}, {}, "strong"),
        ("embedding", {"augment": "crop:0.1,mix:0.1"}, {"cache": "rows"}, "mix:0.1"),
        # "same" would be refused as well.
        ("bank", {"augment": "strong"}, {"cache": "rows"}, "leave bank out"),
        ("proxylesskd", {"augment": "mix:1", "augment.teacher": "same"}, {"classifier": "head.pt"}, "proxylesskd"),
        ("embedding+ekd", {"augment": "strong", "augment.teacher": "same"}, {}, "ekd"),
        ("", {"augment": "strong", "augment.teacher": "same"}, {}, "without a method"),
        ("embedding", {"augment": "qualty"}, {}, "'quality'"),
        ("embedding", {"augment": "crop:0.2,lowres"}, {}, "crop:0.2,lowres"),
        ("embedding", {"augment": "crop:0.2,lowres:0.1,crop:0.5"}, {}, "crop twice"),
        ("embedding", {"augment": "crop:1.2"}, {}, "student.augment.crop"),
        ("embedding", {"augment": "blur:0.2"}, {}, "student.augment.blur"),
        ("embedding", {"augment.teacher": "dirty"}, {}, "student.augment.teacher"),
        ("embedding", {"augment.techer": "same"}, {}, "student.augment.teacher"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    kd: str, options: dict[str, object], keys: dict[str, Any], named: str
) -> None:
    methods = tuple(name for name in kd.split("+") if name)
    with pytest.raises(ConfigError) as caught:
        Distiller(KDConfig(methods, options={"student": options}, **keys), teacher_of(Network(1)))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_refuses_it_before_its_first_run(faces: Faces, tmp_path: Path) -> None:
    words = ["shkd.distil=kd", "shkd.teacher_network=r18", "student.augment=strong", "student.augment.teacher=same"]
    config = config_for(faces, tmp_path / "out", kd="shkd", kd_option=words)
    with pytest.raises(ConfigError, match="kd learns nothing"):
        SHKD.next_run(config)


@pytest.mark.parametrize("method", sorted(own_methods()))
def test_the_page_says_what_each_method_takes(method: str) -> None:
    told = {
        name: [cell == "yes" for cell in cells]
        for names, *cells in rows(section(PAGES["cameras.md"], "Which methods"))
        for name in re.findall(r"`(\w+)`", names)
    }
    if method == "shkd":
        return
    kind: Any = own_methods()[method]
    mixes = "same" in kind.teacher_views and not kind.needs_labels(kind.Config())
    assert told[method] == ["clean" in kind.teacher_views, "same" in kind.teacher_views, mixes]


def test_images_of_another_loader_are_refused_at_the_first_step() -> None:
    distiller = Distiller(KDConfig(("embedding",), options=QUALITY), teacher_of(Network(1)))
    student = distiller.watch(Network(2))
    head = DistillationHead(distiller, ARCFACE, DIMENSION, 5, ranks=RankGroup(alone=True))
    with pytest.raises(ConfigError, match=r"student\.augment has no effect"):
        head(student(torch.zeros(4, 3, 112, 112)), torch.zeros(4))


@pytest.mark.parametrize(("loader", "dali"), [("host", False), ("own", True)])
def test_the_trainer_s_own_loader_does_not_degrade(loader: Any, dali: bool) -> None:
    distiller = Distiller(KDConfig(("embedding",), options=QUALITY, loader=loader), teacher_of(Network(1)))
    made = drop_ins(dict, distiller=distiller, host_loader=lambda *arguments: None)
    with pytest.raises(ConfigError, match=r"student\.augment=quality"):
        made.get_dataloader("/nowhere", 0, 8, dali, False)


@pytest.mark.parametrize("other", [{"augment": "flip"}, {"augment": "quality", "augment.teacher": "same"}])
def test_a_run_goes_on_with_the_views_that_it_was_begun_with(faces: Faces, other: dict[str, object]) -> None:
    *_, head = _wired(faces, QUALITY)
    *_, same = _wired(faces, {"student": {"augment": "photometric:0.2,crop:0.2,lowres:0.2"}})
    same.load_state_dict(head.state_dict())
    *_, changed = _wired(faces, {"student": other})
    with pytest.raises(CheckpointError, match=r"student\.augment"):
        changed.load_state_dict(head.state_dict())


def test_a_student_alone_is_degraded_too(faces: Faces) -> None:
    shown = []
    for option in ("flip", "crop:1"):
        config = {"kd": "", "kd_option": {"student.augment": option}, "num_classes": faces.num_classes}
        loader = drop_ins(config.copy).get_dataloader(str(faces.folder), 0, 9, False, False, 1, 0)
        shown.append(next(iter(loader))[0])
    assert (shown[1] == -1).any((1, 2, 3)).all()
    assert torch.equal(torch.where(shown[1] == -1, shown[1], shown[0]), shown[1])
