"""Logit distillation in one process: values and gradients against the dense twin, the identity, number formats."""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from arcface_kd.losses.class_groups import BatchMass, FixedSize, SampleMass
from arcface_kd.losses.class_weights import ClassWeights
from arcface_kd.losses.divergences import Distillation
from arcface_kd.losses.logit_distillation import Grouping, Logits, logit_distillation, teacher_logits
from arcface_kd.losses.margin import Margin
from arcface_kd.losses.margin_softmax import margin_softmax
from tests.reference.compare import assert_equal, differentiated
from tests.reference.logit_distillation import dense_distillation
from tests.reference.problems import ARCFACE, COSFACE, MARGINS, random_problem

GROUPINGS: dict[str, Grouping | None] = {
    "none": None,
    "fixed": Grouping(FixedSize(5), secondary=True),
    "fixed, by teacher": Grouping(FixedSize(2), "teacher", secondary=True),
    "fixed, everything": Grouping(FixedSize(99), secondary=True),
    "batch": Grouping(BatchMass(0.9, 2), secondary=True),
    "batch, by teacher": Grouping(BatchMass(0.97, 1), "teacher"),
    "sample": Grouping(SampleMass(0.8), secondary=True),
    "sample, by teacher": Grouping(SampleMass(0.99), "teacher"),
}
# Of ce, primary, binary and secondary: a mistake in one cannot be made good by another.
WEIGHTS = (1.0, 0.7, 1.3, 0.4)
FORMATS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
EVERY_OTHER = torch.arange(0, 23, 2)


class Sides(NamedTuple):
    """Student and teacher, of different dimensions."""

    embeddings: Tensor
    labels: Tensor
    centers: Tensor
    teacher_embeddings: Tensor
    teacher_centers: Tensor

    def float(self) -> "Sides":
        return Sides(*(each.float() if each.is_floating_point() else each for each in self))


def sides(seed: int, batch: int = 12, classes: int = 23, dimension: int = 6) -> Sides:
    """A teacher that is as wrong as the student, elsewhere."""
    student = random_problem(seed, batch, classes, dimension)
    teacher = random_problem(seed + 1000, batch, classes, dimension + 3)
    return Sides(*student, teacher.embeddings, teacher.centers)


def distil(
    given: Sides,
    margin: Margin,
    temperature: float = 4.0,
    grouping: Grouping | None = None,
    logits: Logits = "plain",
    index: Tensor | None = None,
    chunk: int | None = None,
    product_dtype: torch.dtype | None = None,
) -> Distillation:
    student, teacher = (
        ClassWeights(each, index=index, product_dtype=product_dtype) for each in (given.centers, given.teacher_centers)
    )
    of_teacher = teacher_logits(given.teacher_embeddings, given.labels, teacher, margin.scale, temperature, chunk=chunk)
    return logit_distillation(
        *(given.embeddings, given.labels, student, of_teacher, margin), grouping=grouping, logits=logits, chunk=chunk
    )


def weighted_sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack([weight * term for weight, term in zip(WEIGHTS, terms, strict=True)]).sum()


def ours(given: Sides, *arguments: Any, factor: float = 1.0, **keywords: Any) -> tuple[Tensor, ...]:
    """(weighted sum of the terms, gradient in the embeddings, gradient in the centers)."""

    def weighted(embeddings: Tensor, centers: Tensor) -> Tensor:
        terms = distil(given._replace(embeddings=embeddings, centers=centers), *arguments, **keywords)
        return factor * weighted_sum(terms[:4])

    return differentiated(weighted, given.embeddings, given.centers)


def twin_terms(given: Sides, *arguments: Any) -> Tensor:
    defaults: tuple[Any, ...] = (None, 4.0, None, "plain", None)
    margin, temperature, grouping, logits, index = (*arguments, *defaults[len(arguments) :])
    return torch.stack(
        dense_distillation(
            *(given.embeddings, given.labels, given.centers, given.teacher_embeddings, given.teacher_centers),
            *(margin, temperature),
            grouping=grouping,
            logits=logits,
            index=index,
        )
    )


def twin(given: Sides, *arguments: Any) -> tuple[Tensor, ...]:
    return differentiated(
        lambda e, c: weighted_sum(twin_terms(given._replace(embeddings=e, centers=c), *arguments).unbind()),
        *(given.embeddings, given.centers),
    )


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("logits", ["plain", "margin"])
@pytest.mark.parametrize("name", GROUPINGS)
def test_terms_and_gradients_equal_the_dense_twin(name: str, logits: Logits, sampled: bool) -> None:
    """Some targets are outside the sampled index: they take part all the same."""
    margins = ("arcface", "cosface", "combined", "arcface-steep", "arcface-filtered")
    for seed, (margin, temperature, chunk) in enumerate(zip(margins, (4, 1, 2.5, 1, 4), (5, None) * 3, strict=False)):
        given = sides(seed)
        arguments = (MARGINS[margin], temperature, GROUPINGS[name], logits, EVERY_OTHER if sampled else None)
        wanted = twin(given, *arguments)
        assert_equal(ours(given, *arguments, chunk=chunk), wanted)
        assert wanted[1].abs().max() > 1e-3


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 8),
    classes=st.integers(1, 20),
    dimension=st.integers(2, 6),
    chunk=st.integers(1, 25),
    seed=st.integers(0, 1000),
    margin=st.sampled_from(["arcface", "cosface", "arcface-steep"]),
    name=st.sampled_from(sorted(GROUPINGS)),
    logits=st.sampled_from(["plain", "margin"]),
    keep=st.integers(0, 20),
)
def test_any_shape_equals_the_dense_twin(
    batch: int, classes: int, dimension: int, chunk: int, seed: int, margin: str, name: str, logits: str, keep: int
) -> None:
    drawn = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    index = None if keep >= classes else drawn[:keep].sort().values
    arguments = (sides(seed, batch, classes, dimension), MARGINS[margin], 4.0, GROUPINGS[name], logits, index)
    assert_equal(ours(*arguments, chunk), twin(*arguments), 1e-9)


@pytest.mark.parametrize("logits", ["plain", "margin"])
@pytest.mark.parametrize("name", ["fixed", "batch", "sample"])
def test_kl_is_binary_and_the_groups_shares_of_theirs(name: str, logits: Logits) -> None:
    """KL(p_t || p_s) = binary + p_t(P) KL_P + p_t(S) KL_S, exactly; row by row, since the shares are a row's."""
    given = sides(2)
    for row in (given.labels >= 0).nonzero().squeeze(1).tolist()[:4]:
        only = given._replace(labels=torch.where(torch.arange(len(given.labels)) == row, given.labels, -1))
        whole, split = (distil(only, COSFACE, 4.0, grouping, logits) for grouping in (None, GROUPINGS[name]))
        share = split.teacher_mass
        together = split.binary + share * split.primary + (1 - share) * split.secondary
        torch.testing.assert_close(whole.primary, together, rtol=1e-12, atol=1e-12)
        assert 0 < share < 1
        assert min(split.binary, split.secondary) > 0


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("index", [None, EVERY_OTHER], ids=["all", "sampled"])
def test_the_cross_entropy_is_margin_softmax(name: str, index: Tensor | None) -> None:
    given, margin = sides(3), MARGINS[name]
    met, wanted = (
        differentiated(loss, given.embeddings, given.centers)
        for loss in (
            lambda e, c: distil(given._replace(embeddings=e, centers=c), margin, index=index).ce,
            lambda e, c: margin_softmax(e, given.labels, c, margin, index=index),
        )
    )
    assert_equal(met, wanted)


@pytest.mark.parametrize("name", GROUPINGS)
def test_each_term_can_be_differentiated_by_itself(name: str) -> None:
    """The log does so, and keeps the graph; the parts add up to the whole."""
    given, grouping = sides(4), GROUPINGS[name]
    leaves = given.embeddings.clone().requires_grad_(), given.centers.clone().requires_grad_()
    found = distil(given._replace(embeddings=leaves[0], centers=leaves[1]), ARCFACE, grouping=grouping)
    parts = [
        torch.autograd.grad(weight * term, leaves, retain_graph=True)
        for weight, term in zip(WEIGHTS, found[:4], strict=True)
        if term.requires_grad
    ]
    assert len(parts) == 2 if grouping is None else 4 - (not grouping.secondary)
    together = tuple(torch.stack(each).sum(0) for each in zip(*parts, strict=True))
    assert_equal(together, ours(given, ARCFACE, grouping=grouping)[1:])


def test_what_is_observed() -> None:
    found, everything = (distil(sides(5), COSFACE, grouping=Grouping(FixedSize(size))) for size in (5, 23))
    assert found.group_size == pytest.approx(5)
    assert 0 < found.student_mass < 1
    assert 0 < found.teacher_mass < 1
    assert everything.group_size == 23
    assert everything.student_mass == everything.teacher_mass == 1
    assert everything.binary.abs() < 1e-300


def test_a_second_derivative_is_refused_and_not_silently_wrong() -> None:
    given = sides(1)
    terms = distil(given._replace(embeddings=given.embeddings.requires_grad_()), ARCFACE)
    (gradient,) = torch.autograd.grad(terms.primary, given.embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
        gradient.sum().backward()


def test_frozen_centers_and_the_teacher_get_no_gradient() -> None:
    """The teacher's own classifier may stand in for the student's."""
    given = sides(6)
    student = random_problem(6, dimension=9).embeddings.requires_grad_()
    frozen, teacher = given.teacher_centers, given.teacher_embeddings.requires_grad_()
    through = given._replace(embeddings=student, centers=frozen, teacher_embeddings=teacher)
    terms = torch.stack(distil(through, ARCFACE)[:2])
    terms.sum().backward()
    assert frozen.grad is None
    assert teacher.grad is None
    assert student.grad is not None
    torch.testing.assert_close(terms, twin_terms(through, ARCFACE)[:2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", GROUPINGS)
def test_no_row_or_no_label_is_a_loss_of_zero(name: str) -> None:
    for empty in (sides(1, batch=0), sides(1, batch=3)._replace(labels=torch.full((3,), -1))):
        assert not any(each.any() for each in ours(empty, ARCFACE, grouping=GROUPINGS[name]))


@pytest.mark.parametrize("name", GROUPINGS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn_from_it(name: str) -> None:
    given = sides(7)
    same = given._replace(teacher_embeddings=given.embeddings, teacher_centers=given.centers)

    def divergence(embeddings: Tensor) -> Tensor:
        return torch.stack(distil(same._replace(embeddings=embeddings), ARCFACE, grouping=GROUPINGS[name])[1:4]).sum()

    loss, gradient = differentiated(divergence, given.embeddings)
    assert loss.abs() < 1e-12
    assert gradient.abs().max() < 1e-12


# ---- number formats, judged against the fp64 truth


# Rounding changes which classes a group takes in, and of 60 each one counts.
BOUNDS = {"none": {"fp32": 2e-5, "bf16": 5e-2, "fp16": 6e-3}, "fixed": {"fp32": 2e-5, "bf16": 0.1, "fp16": 5e-2}}


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("phase", ["first steps", "half way", "converged"])
@pytest.mark.parametrize("name", ["none", "fixed"])
def test_precision(name: str, phase: str, format_name: str) -> None:
    grouping = None if name == "none" else Grouping(FixedSize(60), secondary=True)
    lean = {"first steps": 0.0, "half way": 3.0, "converged": 30.0}[phase]
    given = sides(0, batch=48, classes=700, dimension=64)
    own = normalize(given.centers[given.labels.clamp_min(0)])
    given = given._replace(embeddings=given.embeddings + lean * own)
    arguments = (COSFACE, 4.0, grouping, "margin")
    met = ours(given.float(), *arguments, product_dtype=FORMATS[format_name])
    for what, a, b in zip(("terms", "embeddings", "centers"), met, twin(given, *arguments), strict=True):
        off = float((a.double() - b).norm() / b.norm())
        assert off < BOUNDS[name][format_name], f"{what}: off by {off:.1e}"


@pytest.mark.parametrize("product_dtype", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("temperature", [4.0, 1.0])
@pytest.mark.parametrize("scale", [64.0, 128.0])
def test_all_stays_finite_at_the_ends_of_the_range(
    scale: float, temperature: float, product_dtype: torch.dtype | None
) -> None:
    """Embeddings on and opposite to their centers: one group holds all of the probability, the other none."""
    margin = Margin(scale, 1.0, 0.0, 0.4)
    given = sides(8, batch=24, classes=64, dimension=8).float()
    own = given.centers[given.labels.clamp_min(0)]
    teacher_own = given.teacher_centers[given.labels.clamp_min(0)]
    for student_sign, teacher_sign in itertools.product((1, -1), (1, -1)):
        extreme = given._replace(embeddings=student_sign * own, teacher_embeddings=teacher_sign * teacher_own)
        for grouping in (*GROUPINGS.values(), Grouping(FixedSize(1), "teacher", secondary=True)):
            for each in ours(extreme, margin, temperature, grouping, "margin", product_dtype=product_dtype):
                assert each.isfinite().all(), f"{student_sign} {teacher_sign} {grouping}"


@pytest.mark.parametrize("batch", [2, 64])
def test_fp16_products_survive_a_loss_scaled_for_fp16(batch: int) -> None:
    """GradScaler begins at 65536, which times the logit scale is beyond fp16."""
    given = sides(2, batch, 200, 16).float()
    grouping = Grouping(FixedSize(20), secondary=True)
    plain, scaled = (
        ours(given, ARCFACE, grouping=grouping, product_dtype=torch.float16, chunk=64, factor=factor)
        for factor in (1.0, 65536.0)
    )
    for a, b in zip(plain[1:], scaled[1:], strict=True):
        torch.testing.assert_close(a * 65536.0, b, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_embeddings_get_fp32_terms_and_a_gradient_of_their_own_format(dtype: torch.dtype) -> None:
    given = sides(4, 16, 50, 16).float()
    given = given._replace(embeddings=given.embeddings.to(dtype).requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = torch.stack(distil(given, ARCFACE)[:2])
        (gradient,) = torch.autograd.grad(terms.sum(), given.embeddings)
    assert (terms.dtype, gradient.dtype) == (torch.float32, dtype)
    exact = twin_terms(given._replace(embeddings=given.embeddings.detach().float()), ARCFACE)
    torch.testing.assert_close(terms, exact[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GROUPINGS)
def test_a_spoilt_batch_gives_nan_for_the_loss_scaler_to_see_and_no_more(name: str) -> None:
    """fp16 can overflow: the step is then skipped by its gradients, which have to come back."""
    given = sides(3, 12, 200).float()
    for spoilt, whose in itertools.product((torch.nan, torch.inf), ("embeddings", "centers", "teacher_embeddings")):
        matrix = getattr(given, whose).clone()
        matrix[1] = spoilt
        loss, gradient, _ = ours(given._replace(**{whose: matrix}), COSFACE, grouping=GROUPINGS[name], chunk=64)
        assert loss.isnan()
        assert gradient.isnan().any()


@pytest.mark.parametrize("product_dtype", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("name", GROUPINGS)
def test_no_step_asks_for_a_value(name: str, product_dtype: torch.dtype | None) -> None:
    """Tensors without storage refuse ``item()``, ``bool()`` and shapes that depend on data."""
    with FakeTensorMode():
        given = Sides(
            *(torch.randn(12, 8), torch.randint(-1, 50, (12,)), torch.randn(50, 8)),
            *(torch.randn(12, 9), torch.randn(50, 9)),
        )
        filtered = Margin(80.0, 1.0, 0.5, 0.0, filter_threshold=0.4)
        keywords: dict[str, Any] = {"index": torch.arange(0, 50, 2), "product_dtype": product_dtype}
        _, in_embeddings, in_centers = ours(given, filtered, grouping=GROUPINGS[name], **keywords)
        assert (in_embeddings.shape, in_centers.shape) == ((12, 8), (50, 8))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"embeddings": torch.ones(12, 5)}, r"student's embeddings \(12, 5\).*\(23, 6\)"),
        ({"teacher_embeddings": torch.ones(12, 5)}, r"teacher's embeddings \(12, 5\).*\(23, 9\)"),
        ({"labels": torch.zeros(3).long()}, r"labels \(3,\).* \(12, 9\)"),
    ],
)
def test_shapes_that_do_not_belong_together_are_named(changes: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        distil(sides(1)._replace(**changes), ARCFACE)


def test_a_teacher_s_logits_of_other_classes_or_another_format_are_named() -> None:
    given = sides(1)
    teacher = teacher_logits(given.teacher_embeddings, given.labels, ClassWeights(given.teacher_centers), 64.0, 4.0)
    two = ClassWeights(given.centers, index=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"\(23, 12\) of torch.float64; wanted \(2, 12\)"):
        logit_distillation(given.embeddings, given.labels, two, teacher, ARCFACE)
    with pytest.raises(ValueError, match=r"of torch.float64; wanted \(23, 12\) of torch.float32"):
        logit_distillation(given.embeddings.float(), given.labels, ClassWeights(given.centers), teacher, ARCFACE)
