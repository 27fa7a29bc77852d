"""TCS against its naive twin: a step, the importance of axes, dropping them; and the plain backbone that is left."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import normalize

from arcface_kd.backbones import get_backbone
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import CheckpointError, ConfigError
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.tcs.method import TCS, TCSConfig
from tests.reference.problems import ARCFACE, COSFACE, random_problem
from tests.reference.tcs import classification, mimic_distance, step_importance, unfolded_coordinates
from tests.teachers.cache.test_principal_components import filled_cache

CLASSES, DIMENSION, TEACHER_DIMENSION, ROWS, STEPS = 23, 10, 9, 12, 100
# Six axes of nine, which the student's ten outputs have room for.
CONFIG = TCSConfig(dimension=6, mimic=3.0, drop=0.5, rounds=3, drop_begin=0.1, drop_end=0.7)


def small_student(size: int = DIMENSION) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.AvgPool2d(14), nn.Flatten(), nn.Linear(192, size), nn.BatchNorm1d(size))


def context(folder: Path, student: nn.Module | None, **keys: Any) -> RunContext:
    cache, _ = filled_cache(folder / "rows", images=40, dimension=TEACHER_DIMENSION)
    given: dict[str, Any] = {
        "num_classes": CLASSES,
        "embedding_size": DIMENSION,
        "margin": ARCFACE,
        "ranks": RankGroup(alone=True),
        "teacher_embedding_size": TEACHER_DIMENSION,
        "total_steps": STEPS,
        "cache": cache,
        "student": student,
    }
    return RunContext(**{**given, **keys})


def method_of(folder: Path, config: TCSConfig = CONFIG, student: nn.Module | None = None, **keys: Any) -> TCS:
    student = student or small_student()
    TCS.prepare_student(config, student)
    return TCS(config, context(folder, student, **keys))


def batch(step: int, seed: int = 0) -> Batch:
    """Twelve rows, two of one class and one without a label; outputs without an axis are zero, as the student's are."""
    problem = random_problem(seed, ROWS, CLASSES, DIMENSION)
    student = problem.embeddings.clone()
    student[:, 6:] = 0
    student.requires_grad_()
    generator = torch.Generator().manual_seed(seed + 1)
    teacher = normalize(torch.randn(ROWS, TEACHER_DIMENSION, generator=generator, dtype=torch.float64))
    return Batch(student, student, problem.labels, teacher, [ROWS], step)


@pytest.mark.parametrize("margin", [ARCFACE, COSFACE, Margin(32.0, 1.1, 0.3, 0.2)], ids=["arc", "cos", "combined"])
@pytest.mark.parametrize("gone", [[], [1, 4]], ids=["all", "masked"])
def test_a_step_equals_the_twin(tmp_path: Path, margin: Margin, gone: list[int]) -> None:
    method = method_of(tmp_path, margin=margin).double()
    method.mask[gone] = 0
    # Past the last round, so that nothing else is dropped; the importance is then not accumulated.
    method._kept = 6 - len(gone)
    given, mask = batch(step=15), method.mask
    assert given.teacher is not None
    centers = method.classifier.weight.detach().clone().requires_grad_()
    ce = classification(given.embeddings, given.labels, centers, margin, mask)
    mimic = 3.0 * mimic_distance(given.embeddings, given.teacher, method.mean, method.axes, mask)
    wanted = torch.autograd.grad(ce + mimic, [given.embeddings, centers])
    terms = method(given)
    assert list(terms) == ["ce", "mimic"]
    torch.testing.assert_close((terms["ce"], terms["mimic"]), (ce, mimic), rtol=1e-10, atol=1e-10)
    # Importance comes with the trainer's backward pass, and with no other.
    sum(terms.values()).backward()
    met = given.embeddings.grad, method.classifier.weight.grad
    torch.testing.assert_close(met, (wanted[0], wanted[1] * mask), rtol=1e-9, atol=1e-10)
    assert wanted[0][:, [*gone, 6, 7, 8, 9]].count_nonzero() == 0
    importance = step_importance(given.embeddings, given.labels, centers, margin, mask)
    torch.testing.assert_close(method.importance, importance, rtol=1e-8, atol=1e-12)


def test_without_mimic_the_teacher_is_a_basis_and_nothing_else(tmp_path: Path) -> None:
    method = method_of(tmp_path, replace(CONFIG, mimic=0.0)).double()
    assert list(method(batch(0))) == ["ce"]


@pytest.mark.parametrize("scale", [1024.0, 1e-3])
def test_importance_does_not_hang_on_the_loss_scale(tmp_path: Path, scale: float) -> None:
    plain, scaled = (method_of(tmp_path).double() for _ in range(2))
    for step in (10, 11):
        sum(plain(batch(step, step)).values()).backward()
        (sum(scaled(batch(step, step)).values()) * scale).backward()
    torch.testing.assert_close(scaled.importance, plain.importance)
    assert float(plain.importance.sum()) == pytest.approx(2)


def test_an_overflown_step_says_nothing(tmp_path: Path) -> None:
    method = method_of(tmp_path)
    given = batch(15)
    terms = method(replace(given, embeddings=given.embeddings.float(), teacher=given.teacher))
    (terms["ce"] * float("inf")).backward()
    assert method.importance.tolist() == [0.0] * DIMENSION


def test_asking_for_gradients_twice_counts_once(tmp_path: Path) -> None:
    """The log takes each term's gradient in the embeddings before the trainer's backward pass."""
    once, twice = (method_of(tmp_path).double() for _ in range(2))
    sum(once(batch(15)).values()).backward()
    given = batch(15)
    terms = twice(given)
    for term in terms.values():
        torch.autograd.grad(term, given.embeddings, retain_graph=True)
    sum(terms.values()).backward()
    assert torch.equal(twice.importance, once.importance)


class TestSchedule:
    @settings(max_examples=60, deadline=None)
    @given(
        axes=st.integers(1, 400),
        drop=st.floats(0, 0.99),
        rounds=st.integers(1, 12),
        edges=st.tuples(st.integers(0, 98), st.integers(1, 100)).filter(lambda pair: pair[0] < pair[1]),
    )
    def test_falls_step_by_step_to_the_share(self, axes: int, drop: float, rounds: int, edges: tuple[int, int]) -> None:
        begin, end = edges[0] / 100, edges[1] / 100
        config = TCSConfig(drop=drop, rounds=rounds, drop_begin=begin, drop_end=end)
        kept = [config.kept(axes, step / 1000) for step in range(1001)]
        assert kept[0] == axes
        assert kept == sorted(kept, reverse=True)
        assert kept[-1] == max(1, axes - round(axes * drop))
        assert kept[edges[1] * 10] == kept[-1]
        assert len(set(kept)) <= rounds + 1
        watched = [step for step in range(1001) if config.watches(step / 1000)]
        assert watched == ([] if drop == 0 else list(range(edges[0] * 10, edges[1] * 10)))

    def test_rounds_are_evenly_spaced(self) -> None:
        kept = [CONFIG.kept(60, step / 100) for step in range(100)]
        assert [step for step in range(1, 100) if kept[step] < kept[step - 1]] == [30, 50, 70]
        assert kept[-1] == 30


def drop_by_steps(method: TCS, steps: range, optimizer: torch.optim.Optimizer | None = None) -> None:
    for step in steps:
        loss = sum(method(batch(step, step)).values())
        assert isinstance(loss, Tensor)
        if optimizer is not None:
            optimizer.zero_grad()
        loss.backward()
        if optimizer is not None:
            optimizer.step()


class TestDropping:
    def test_the_least_important_axes_go(self, tmp_path: Path) -> None:
        student = small_student()
        method = method_of(tmp_path, student=student).double()
        norm = student[3]
        assert isinstance(norm, nn.BatchNorm1d)
        deviations = norm.weight.clone()
        drop_by_steps(method, range(10, 30))
        order = method.importance[:6].argsort().tolist()
        assert method.mask.tolist() == [1.0] * 6 + [0.0] * 4
        method(batch(30))
        assert (method.mask == 0).nonzero().flatten().tolist() == sorted([order[0], 6, 7, 8, 9])
        assert method.importance.count_nonzero() == 0, "the next round counts anew"
        torch.testing.assert_close(norm.weight.detach(), deviations * method.mask.float(), rtol=0, atol=0)
        outputs = student(torch.rand(8, 3, 112, 112))
        assert outputs[:, order[0]].count_nonzero() == 0
        assert outputs[:, order[1]].count_nonzero() == 8
        drop_by_steps(method, range(31, 71))
        assert int(method.mask.sum()) == 3
        assert method.observations()["axes"] == 3

    def test_of_equal_importance_those_of_less_variance_go_first(self, tmp_path: Path) -> None:
        method = method_of(tmp_path).double()
        method(batch(70))
        assert method.mask.tolist() == [1.0] * 3 + [0.0] * 7

    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
    def test_what_is_gone_stays_gone(self, tmp_path: Path, kind: Any) -> None:
        """Neither momentum nor weight decay moves it: not in the student, not in the class centers."""
        student = small_student()
        method = method_of(tmp_path, student=student).double()
        keys = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        optimizer = kind([*student.parameters(), *method.parameters()], lr=0.1, weight_decay=0.1, **keys)
        images, norm = torch.rand(ROWS, 3, 112, 112), student[3]
        assert isinstance(norm, nn.BatchNorm1d)
        for step in range(10, 90):
            given = batch(step, step)
            embeddings = student(images).double()
            sum(method(replace(given, embeddings=embeddings)).values()).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(norm.weight != 0, method.mask > 0)
            assert norm.bias.count_nonzero() == 0
        method(batch(90))
        gone = method.mask == 0
        assert int(gone.sum()) == 7
        assert method.classifier.weight[:, gone].count_nonzero() == 0
        assert method.classifier.weight[:, ~gone].count_nonzero() == 3 * CLASSES

    def test_none_with_drop_0(self, tmp_path: Path) -> None:
        method = method_of(tmp_path, replace(CONFIG, drop=0.0), total_steps=None).double()
        drop_by_steps(method, range(95, 100))
        assert int(method.mask.sum()) == 6
        assert method.importance.count_nonzero() == 0


def test_weights_that_are_loaded_late_get_the_scale_of_the_system(tmp_path: Path) -> None:
    student = small_student()
    pretrained = {name: torch.ones_like(value) for name, value in student.state_dict().items()}
    method = method_of(tmp_path, student=student).double()
    scale = student.state_dict()["3.weight"].clone()
    student.load_state_dict(pretrained)
    method(batch(0))
    assert torch.equal(student.state_dict()["3.weight"], scale)
    assert student.state_dict()["3.bias"].count_nonzero() == 0
    assert student.state_dict()["2.weight"].mean() == 1


def test_a_resumed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = method_of(tmp_path).double()
    drop_by_steps(whole, range(40))
    student = small_student()
    resumed = method_of(tmp_path, student=student).double()
    resumed.load_state_dict(whole.state_dict())
    student.load_state_dict({**student.state_dict(), "3.weight": whole._norm[0].weight.detach()})
    for method in (whole, resumed):
        drop_by_steps(method, range(40, 75))
    assert int(whole.mask.sum()) == 3
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert torch.equal(resumed._norm[0].weight, whole._norm[0].weight)


def test_another_system_is_not_resumed(tmp_path: Path) -> None:
    state = method_of(tmp_path).state_dict()
    other = method_of(tmp_path, replace(CONFIG, dimension=5))
    with pytest.raises(CheckpointError, match=r"has 6 axes of 9 dimensions, this run's 5 of 9: go on with the tcs\.\*"):
        other.load_state_dict(state)


@pytest.mark.parametrize("name", ["thin_r18", "mbf"])
def test_the_plain_backbone_is_the_unfolded_student(tmp_path: Path, name: str) -> None:
    """What is saved, in a fresh network, against the place in the teacher's space that the same features lead to."""
    torch.manual_seed(3)
    student = get_backbone(name, num_features=DIMENSION)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    keys = list(student.state_dict())
    method = method_of(tmp_path, student=student)
    images = torch.rand(16, 3, 112, 112) * 2 - 1
    student(images)
    method(batch(50))
    assert int(method.mask.sum()) == 4
    assert list(student.state_dict()) == keys
    norms = [each for each in student.modules() if isinstance(each, nn.BatchNorm1d)]
    assert not any(parameter.requires_grad for parameter in norms[-1].parameters())
    torch.save(student.state_dict(), tmp_path / "model.pt")
    plain = get_backbone(name, num_features=DIMENSION)
    plain.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)

    linear = [module for module in plain.modules() if isinstance(module, nn.Linear)][-1]
    norm = [module for module in plain.modules() if isinstance(module, nn.BatchNorm1d)][-1]
    seen: list[Tensor] = []
    linear.register_forward_hook(lambda module, given, output: seen.append(given[0].detach()))
    with torch.no_grad():
        embeddings = plain.eval()(images)
        live = student.eval()(images)
    count = len(method.axes)
    deviations = torch.zeros(DIMENSION)
    deviations[:count] = norm.weight[:count].detach()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    per_output = (deviations / (norm.running_var + norm.eps).sqrt()).double()[:count]
    bias = torch.zeros(DIMENSION) if linear.bias is None else linear.bias.detach()
    matrix = per_output.unsqueeze(1) * linear.weight.detach().double()[:count]
    offset = per_output * (bias - norm.running_mean).double()[:count]
    wanted = unfolded_coordinates(seen[0].double(), matrix, offset, method.mean.double(), method.axes.double())
    torch.testing.assert_close(embeddings[:, :count].double(), wanted, rtol=1e-5, atol=1e-5)
    assert embeddings.shape == (16, DIMENSION)
    assert embeddings[:, count:].count_nonzero() == 0
    assert torch.equal(live, embeddings)
    assert float(embeddings.norm(dim=1).min()) > 0.1


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"student": None}, "let the distiller watch the student first"),
        ({"student": small_student(8)}, "8 outputs, the head embedding_size=10"),
        ({"total_steps": None}, r"give total_steps to the head, or tcs\.drop=0"),
    ],
)
def test_runs_that_it_cannot_work_in_are_refused(tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TCS(CONFIG, context(tmp_path, **{"student": small_student(), **keys}))
