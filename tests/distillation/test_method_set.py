"""Methods of a run, built in and from elsewhere: which stand together, and what they log."""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd import registry
from arcface_kd.checkpoints.run_settings import from_tensor
from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distillation.tensorboard_log import TensorBoardLog
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.evaluation.report.scalars import read_scalars
from arcface_kd.methods.base import Batch, Method, Requirement
from tests.distillation.test_distiller import CLASSES, LABELS, Embedder, images, make
from tests.reference.problems import ARCFACE


@pytest.mark.usefixtures("strangers")
def test_methods_that_do_not_look_at_the_projection_need_none() -> None:
    for kd in ("unprojected", "rkd", "ekd+unprojected"):
        run = make(kd=kd, dimensions=(4, 6))
        assert run.head.projection is None
        run.head(run.student(images()), LABELS).backward()
    assert make(kd="unprojected", dimensions=(4, 6), student={"projection": "linear"}).head.projection is None
    with pytest.raises(ConfigError, match="the teacher has 6 dimensions and the student 4"):
        make(kd="rkd+pull", dimensions=(4, 6))


@dataclass(frozen=True)
class PullConfig:
    """How strongly it pulls."""

    weight: float = 1.0


class Pull(Method):
    """A stranger's method that does not classify: students towards their teachers."""

    Config = PullConfig
    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.TEACHER_EMBEDDINGS})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.teacher is not None
        distance = (normalize(batch.projected) - normalize(batch.teacher)).square().sum(1).mean()
        return {str(getattr(self, "term", "pull")): self.config.weight * distance}


class Clashing(Pull):
    """Names its term as the classifier does."""

    term = "ce"


class Constant(Pull):
    """Two terms that no embedding moves: a number and a parameter."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        two = torch.full((), 2.0)
        return {"plain": two, "learned": two.clone().requires_grad_() * 1}


class Unprojected(Pull):
    """Compares nothing with the teacher's dimension."""

    projects = False

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"size": batch.projected.square().sum()}


class Rival(Pull):
    """Wants to classify as well."""

    classifies = True


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods of this file, as if a package had brought them."""
    own = {name: f"{__name__}:{kind}" for name, kind in (("pull", "Pull"), ("clash", "Clashing"), ("rival", "Rival"))}
    own |= {name.lower(): f"{__name__}:{name}" for name in ("Constant", "Unprojected")}
    own["function"] = f"{__name__}:make"
    known = registry.entry_points

    def entry_points(group: str) -> dict[str, metadata.EntryPoint]:
        found = dict(known(group))
        if group == registry.METHODS:
            found |= {name: metadata.EntryPoint(name, value, group) for name, value in own.items()}
        return found

    monkeypatch.setattr(registry, "entry_points", entry_points)


@pytest.mark.usefixtures("strangers")
def test_a_method_that_does_not_classify_stands_beside_the_learned_classifier() -> None:
    run = make(kd="pull", pull={"weight": "3"})
    assert set(run.head.methods) == {"classifier", "pull"}
    embeddings = run.student(images())
    total = run.head(embeddings, LABELS)
    teacher = normalize(run.teacher(images()))
    pull = 3 * (normalize(embeddings) - teacher).square().sum(1).mean()
    alone = make(kd="pull", pull={"weight": 0.0})
    torch.testing.assert_close(total, pull + alone.head(alone.student(images()), LABELS))
    total.backward()
    assert len(list(run.head.parameters())) == 1


@pytest.mark.usefixtures("strangers")
def test_a_method_that_classifies_combines_with_one_that_does_not() -> None:
    run = make(kd="adadistill+pull")
    assert set(run.head.methods) == {"adadistill", "pull"}
    run.head(run.student(images()), LABELS).backward()


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize(("kd", "other"), [("clash", "classifier"), ("adadistill+clash", "adadistill")])
def test_terms_of_one_name_are_both_trained_on_and_logged_under_their_methods(
    kd: str, other: str, tmp_path: Path
) -> None:
    run = make(kd=kd, log=TensorBoardLog(tmp_path, 1, writes=True))
    embeddings = run.student(images())
    total = run.head(embeddings, LABELS)
    scalars = {name.removeprefix("kd/"): values.y[-1] for name, values in read_scalars(tmp_path).items()}
    pull = (normalize(embeddings) - normalize(run.teacher(images()))).square().sum(1).mean()
    assert scalars["clash/ce"] == pytest.approx(pull.item(), rel=1e-5)
    assert scalars["clash/ce"] + scalars[f"{other}/ce"] == pytest.approx(total.item(), rel=1e-5)
    assert {f"gradient_norm/{name}/ce" for name in ("clash", other)} <= set(scalars)
    assert "ce" not in scalars


@pytest.mark.usefixtures("strangers")
def test_a_term_that_no_embedding_moves_is_logged_with_a_share_of_0(tmp_path: Path) -> None:
    run = make(kd="constant", log=TensorBoardLog(tmp_path, 1, writes=True))
    run.head(run.student(images()), LABELS).backward()
    scalars = {name.removeprefix("kd/"): values.y[-1] for name, values in read_scalars(tmp_path).items()}
    assert scalars["plain"] == scalars["learned"] == 2
    assert scalars["gradient_norm/plain"] == scalars["gradient_share/learned"] == 0
    assert scalars["gradient_share/ce"] == 1


def test_shares_of_gradients_that_are_all_0_are_0(tmp_path: Path) -> None:
    run = make(
        kd="embedding", log=TensorBoardLog(tmp_path, 1, writes=True), embedding={"labels": "none", "weight": 0.0}
    )
    run.head(run.student(images()), LABELS)
    assert read_scalars(tmp_path)["kd/gradient_share/embedding"].y.tolist() == [0]


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (("adadistill", "rival"), "adadistill and rival both bring a classification loss of their own"),
        (("nonsense",), "no method named 'nonsense'"),
        (("function",), "method 'function' is .*; it must be a subclass of Method"),
    ],
)
def test_methods_that_cannot_be_are_refused(methods: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Distiller(KDConfig(methods))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adadistill": {"aplha": "plain"}}, r"unknown option adadistill\.aplha"),
        ({"adadistill": {"alpha": "heavy"}}, r"adadistill\.alpha is 'heavy'"),
        ({"student": {"projection": "round"}}, r"student\.projection is 'round'"),
    ],
)
def test_options_are_checked_before_a_teacher_is_looked_for(options: dict[str, dict[str, object]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Distiller(KDConfig(("adadistill",), "no_such_teacher.pt", options=options))


def test_no_method_is_the_trainer_s_own_head_and_needs_no_teacher() -> None:
    distiller = Distiller(KDConfig())
    student = Embedder(5, 2, [], "student")
    assert distiller.watch(student) is student
    assert not student._forward_pre_hooks
    head = DistillationHead(distiller, ARCFACE, 5, CLASSES, ranks=RankGroup(alone=True))
    head(student(images()), LABELS).backward()
    assert set(head.state_dict()) == {"_extra_state", "class_range", "step", "methods.classifier.weight"}
    assert from_tensor(head.state_dict()["_extra_state"])["class_centers"] == "methods.classifier.weight"


def test_a_teacher_is_not_loaded_when_distillation_is_off(tmp_path: Path) -> None:
    assert Distiller(KDConfig((), str(tmp_path / "no_such_teacher.pt"))).teacher is None


def test_a_teacher_that_is_missing_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="give one with --kd-teacher FILE"):
        Distiller(KDConfig(("adadistill",)))
    with pytest.raises(TeacherError, match="no_such_teacher"):
        Distiller(KDConfig(("adadistill",), str(tmp_path / "no_such_teacher.pt")))


@pytest.mark.parametrize(
    ("sample_rate", "classes", "said"), [(0.0, 7, "sample_rate is 0.0"), (1.5, 7, "sample_rate is 1.5")]
)
def test_a_head_that_cannot_be_is_refused(sample_rate: float, classes: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DistillationHead(Distiller(KDConfig()), ARCFACE, 5, classes, sample_rate, ranks=RankGroup(alone=True))


@pytest.mark.usefixtures("strangers")
def test_terms_and_their_gradient_norms_are_logged_apart(tmp_path: Path) -> None:
    run = make(kd="adadistill+pull", log=TensorBoardLog(tmp_path, 2, writes=True))
    for step in range(4):
        embeddings = run.student(images(seed=step))
        loss = run.head(embeddings, LABELS)
        if step == 3:
            pull = (normalize(embeddings) - normalize(run.teacher(images(seed=step)))).square().sum(1).mean()
            (wanted,) = torch.autograd.grad(pull, embeddings, retain_graph=True)
        loss.backward()
    scalars = read_scalars(tmp_path)
    names = {"ce", "pull", "gradient_norm/ce", "gradient_norm/pull", "alpha_mean", "student_teacher_cosine"}
    assert names <= {name.removeprefix("kd/") for name in scalars}
    assert scalars["kd/ce"].x.tolist() == [2, 4]
    assert scalars["kd/pull"].y[-1] == pytest.approx(pull.item(), rel=1e-5)
    assert scalars["kd/gradient_norm/pull"].y[-1] == pytest.approx(float(wanted.norm()), rel=1e-4)
    both = scalars["kd/gradient_norm/ce"].y + scalars["kd/gradient_norm/pull"].y
    share = scalars["kd/gradient_share/pull"].y
    assert share.tolist() == pytest.approx((scalars["kd/gradient_norm/pull"].y / both).tolist(), rel=1e-5)
    assert (share + scalars["kd/gradient_share/ce"].y).tolist() == pytest.approx([1, 1], rel=1e-5)
