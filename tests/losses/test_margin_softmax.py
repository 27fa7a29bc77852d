"""Margin softmax in one process: values and gradients against the dense twin, precision, corner cases."""

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.losses import margin_softmax as margin_softmax_module
from arcface_kd.losses.class_weights import inverse_norm
from arcface_kd.losses.gradients import in_embeddings_alone
from arcface_kd.losses.margin import Margin
from arcface_kd.losses.margin_softmax import margin_softmax
from tests.reference.compare import assert_equal, differentiated
from tests.reference.margin_softmax import dense_margin_softmax
from tests.reference.problems import ARCFACE, COMBINED, MARGINS, Problem, random_problem

EVERY_OTHER = torch.arange(0, 23, 2)


def twin(problem: Problem, margin: Margin, *arguments: Any) -> tuple[Tensor, ...]:
    """(loss, gradient in the embeddings, gradient in the centers)."""
    return differentiated(
        lambda e, c: dense_margin_softmax(e, problem.labels, c, margin, *arguments), problem.embeddings, problem.centers
    )


def truth(problem: Problem, margin: Margin) -> tuple[Tensor, ...]:
    return twin(Problem(problem.embeddings.double(), problem.labels, problem.centers.double()), margin)


def ours(problem: Problem, margin: Margin, **keywords: Any) -> tuple[Tensor, ...]:
    return differentiated(
        lambda e, c: margin_softmax(e, problem.labels, c, margin, **keywords), problem.embeddings, problem.centers
    )


@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("index", [None, EVERY_OTHER], ids=["all", "sampled"])
@pytest.mark.parametrize("name", MARGINS)
def test_loss_and_gradients_equal_the_dense_twin(name: str, index: Tensor | None, chunk: int | None) -> None:
    """Half of the labels are outside the sampled index: targets take part all the same, and pull their center."""
    problem = random_problem(seed=1)
    wanted = twin(problem, MARGINS[name], index)
    assert_equal(ours(problem, MARGINS[name], index=index, chunk=chunk), wanted)
    assert wanted[1].abs().max() > 1e-3


@pytest.mark.parametrize("chunk", [7, None])
@pytest.mark.parametrize("name", ["arcface", "cosface", "combined-filtered"])
def test_a_margin_for_each_row_is_that_margin_in_the_twin(name: str, chunk: int | None) -> None:
    """Some rows without any margin, some beyond the turn; those without a label count for nothing."""
    problem, margin = random_problem(seed=1), MARGINS[name]
    row_m2 = torch.linspace(0, 1.5, 12, dtype=torch.float64).flip(0)

    def row_by_row(embeddings: Tensor, centers: Tensor) -> Tensor:
        losses = [
            dense_margin_softmax(row[None], label[None], centers, replace(margin, m2=float(m2)), EVERY_OTHER)
            for row, label, m2 in zip(embeddings, problem.labels, row_m2, strict=True)
        ]
        return torch.stack(losses).sum() / (problem.labels >= 0).sum()

    met = ours(problem, margin, index=EVERY_OTHER, chunk=chunk, row_m2=row_m2)
    assert_equal(met, differentiated(row_by_row, problem.embeddings, problem.centers))
    assert float((met[0] - ours(problem, margin, index=EVERY_OTHER)[0]).abs()) > 0.1
    assert not margin_softmax(*problem, margin, row_m2=row_m2.requires_grad_()).requires_grad


@pytest.mark.parametrize("name", MARGINS)
def test_every_problem_reaches_what_it_is_there_for(name: str) -> None:
    """The dense comparison means nothing if no angle passes pi and no cosine is filtered."""
    problem, margin = random_problem(seed=1), MARGINS[name]
    cosine = normalize(problem.embeddings) @ normalize(problem.centers).T
    own = cosine[problem.labels >= 0, problem.labels[problem.labels >= 0]]
    assert (problem.labels == -1).any()
    assert len(set(problem.labels.tolist())) < len(problem.labels)
    if margin.m2 > 0 or margin.m1 > 1:
        assert (margin.m1 * own.acos() + margin.m2 > torch.pi).any()
    if margin.filter_threshold > 0:
        assert (cosine > margin.filter_threshold).any()


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 9),
    classes=st.integers(1, 20),
    dimension=st.integers(2, 7),
    chunk=st.integers(1, 25),
    seed=st.integers(0, 1000),
    name=st.sampled_from(sorted(MARGINS)),
    keep=st.integers(0, 20),
)
def test_any_shape_equals_the_dense_twin(
    batch: int, classes: int, dimension: int, chunk: int, seed: int, name: str, keep: int
) -> None:
    problem = random_problem(seed, batch, classes, dimension)
    cosine = normalize(problem.embeddings) @ normalize(problem.centers).T
    threshold = MARGINS[name].filter_threshold
    # Cosines of exactly +-1 have no derivative in the twin (they are tested below), those at the threshold no side.
    assume(not (threshold > 0 and ((cosine - threshold).abs() < 1e-12).any()))
    drawn = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    index = None if keep >= classes else drawn[:keep].sort().values
    met = ours(problem, MARGINS[name], index=index, chunk=chunk)
    assert_equal(met, twin(problem, MARGINS[name], index), 1e-9)


@pytest.mark.parametrize("weight_wants_gradient", [False, True])
def test_a_second_derivative_is_refused_and_not_silently_wrong(weight_wants_gradient: bool) -> None:
    problem = random_problem(seed=1)
    embeddings = problem.embeddings.requires_grad_()
    weight = torch.ones((), dtype=torch.float64, requires_grad=weight_wants_gradient)
    (gradient,) = torch.autograd.grad(weight * margin_softmax(*problem, ARCFACE), embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
        gradient.sum().backward()


# ---- corner cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MARGINS)
def test_huge_logit_scale_and_underflow_stay_finite_and_right(name: str, dtype: torch.dtype) -> None:
    """s = 512: a row's exponentials span e^1000, most of them 0 in any format."""
    problem, margin = random_problem(7, dtype=dtype), replace(MARGINS[name], scale=512.0)
    assert_equal(ours(problem, margin, chunk=5), truth(problem, margin), 1e-9 if dtype == torch.float64 else 2e-3)


@pytest.mark.parametrize("scale", [30.0, 64.0, 65.0, 80.0])
def test_fp32_holds_the_largest_and_the_smallest_logits_in_one_batch(scale: float) -> None:
    """All classes lie in one direction; one row looks along it and one against it: their exponentials differ by e^128.

    Up to a scale of 64 they are taken of the bare logits, beyond it less a running maximum.
    """
    generator = torch.Generator().manual_seed(0)
    direction = torch.ones(8)
    centers = direction + 0.05 * torch.randn(30, 8, generator=generator)
    tilt = 0.2 * torch.randn(2, 8, generator=generator)
    problem = Problem(torch.stack([direction + tilt[0], -direction + tilt[1]]), torch.tensor([3, 4]), centers)
    for margin in (Margin(scale, 1.0, 0.0, 0.0), Margin(scale, 1.0, 0.5, 0.0)):
        wanted = truth(problem, margin)
        for row in (0, 1):
            alone = problem._replace(labels=torch.where(torch.arange(2) == row, problem.labels, -1))
            part = truth(alone, margin)[2] / 2
            assert part.norm() > 0.05 * wanted[2].norm(), "a row that hardly moves the centers could be lost unseen"
        for a, b in zip(ours(problem, margin, chunk=7), wanted, strict=True):
            assert (a.double() - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_embeddings_on_and_opposite_their_center_have_finite_gradients(
    name: str, dtype: torch.dtype, sign: float
) -> None:
    centers = torch.eye(4, dtype=dtype) * 2
    problem = Problem(sign * centers[:3].clone(), torch.tensor([0, 1, 2]), centers)
    loss, in_embeddings, in_centers = ours(problem, MARGINS[name])
    for values in (loss, in_embeddings, in_centers):
        assert values.isfinite().all()
    nudged = problem._replace(embeddings=problem.embeddings + torch.tensor([0.0, 0.0, 0.0, 1e-5], dtype=dtype))
    near = ours(nudged, MARGINS[name])
    torch.testing.assert_close(loss, near[0], rtol=1e-3, atol=1e-3)
    # On the center itself the gradient has a kink (every direction is downhill for the margin), but stays bounded.
    assert in_embeddings.norm() <= near[1].norm() + MARGINS[name].scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_centers_of_zero_norm_have_cosine_0_and_embeddings_are_finite(dtype: torch.dtype) -> None:
    problem = random_problem(8, dtype=dtype)
    problem.centers[problem.labels[0]] = 0  # a target
    problem.centers[(problem.labels.max() + 1) % 23] = 0
    met, wanted = ours(problem, ARCFACE, chunk=4), twin(problem, ARCFACE)
    assert_equal(met, wanted, 1e-10 if dtype == torch.float64 else 1e-4)
    problem.embeddings[0] = 0
    assert all(values.isfinite().all() for values in ours(problem, ARCFACE))


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_rows_without_label_count_for_nothing(chunk: int | None) -> None:
    problem = random_problem(9)
    kept = problem.labels >= 0
    assert not kept.all()
    met = ours(problem, ARCFACE, chunk=chunk)
    wanted = ours(Problem(problem.embeddings[kept], problem.labels[kept], problem.centers), ARCFACE, chunk=chunk)
    assert_equal((met[0], met[1][kept], met[2]), wanted)
    assert (met[1][~kept] == 0).all()


@pytest.mark.parametrize("name", MARGINS)
def test_nothing_to_tell_apart_has_loss_and_gradients_0(name: str) -> None:
    """No row, no label, one class, a sample of none, and never NaN."""
    empty = torch.empty(0, dtype=torch.int64)
    one_class = random_problem(13)._replace(labels=torch.zeros(12, dtype=torch.int64))
    cases: list[tuple[Problem, Tensor | None]] = [(random_problem(10, batch=1, classes=1), None), (one_class, empty)]
    for batch in (0, 1, 5):
        cases.append((random_problem(9, batch=batch)._replace(labels=torch.full((batch,), -1)), None))
    for problem, index in cases:
        assert all((values == 0).all() for values in ours(problem, MARGINS[name], index=index))


@pytest.mark.parametrize("index", [None, torch.tensor([1, 2, 5, 22])], ids=["all", "sampled"])
def test_norms_that_the_caller_keeps_change_nothing(index: Tensor | None) -> None:
    problem = random_problem(11)
    norms = inverse_norm(problem.centers)
    met = differentiated(
        lambda e: margin_softmax(
            e, problem.labels, problem.centers, COMBINED, inverse_norms=norms, index=index, chunk=4
        ),
        problem.embeddings,
    )
    assert_equal(met, twin(problem, COMBINED, index)[:2])


def test_non_contiguous_inputs_are_taken_without_a_warning() -> None:
    def strided(rows: Tensor) -> Tensor:
        return torch.stack([rows, rows], rows.ndim)[..., 0]

    problem = random_problem(12)
    index, labels = strided(EVERY_OTHER), strided(problem.labels)
    assert not any(each.is_contiguous() for each in (index, labels, strided(problem.embeddings)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        met = differentiated(
            lambda e, c: margin_softmax(strided(e), labels, c.T.contiguous().T, ARCFACE, index=index, chunk=5),
            *(problem.embeddings, problem.centers),
        )
    assert_equal(met, twin(problem, ARCFACE, EVERY_OTHER))


def test_inputs_are_left_as_they_were() -> None:
    problem = random_problem(14)
    before = copy.deepcopy(problem)
    margin_softmax(*problem, MARGINS["combined-filtered"], index=torch.arange(3, 20), chunk=4)
    assert all(torch.equal(a, b) for a, b in zip(problem, before, strict=True))


def test_frozen_centers_may_move_between_forward_and_backward() -> None:
    """As they do when a trainer calls the head twice before it goes back."""
    problem = random_problem(15)
    wanted = twin(problem, ARCFACE)[1]
    loss = margin_softmax(problem.embeddings.requires_grad_(), problem.labels, problem.centers, ARCFACE)
    problem.centers.zero_()
    (met,) = torch.autograd.grad(loss, problem.embeddings)
    torch.testing.assert_close(met, wanted, rtol=1e-10, atol=1e-10)


def test_nothing_of_the_size_of_the_logits_is_kept_for_frozen_centers() -> None:
    problem = random_problem(16, batch=8, classes=5000)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        margin_softmax(problem.embeddings.requires_grad_(), problem.labels, problem.centers, ARCFACE)
    assert kept == [(8, 6)]


def test_gradients_reach_centers_alone() -> None:
    problem = random_problem(17)
    met = differentiated(lambda c: margin_softmax(problem.embeddings, problem.labels, c, ARCFACE), problem.centers)
    torch.testing.assert_close(met[1], twin(problem, ARCFACE)[2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("embeddings", "labels", "centers", "row_m2", "said"),
    [
        ((4, 3), (4,), (5, 2), None, r"embeddings \(4, 3\) and class centers \(5, 2\)"),
        ((4,), (4,), (5, 4), None, r"embeddings \(4,\)"),
        ((4, 3), (5,), (5, 3), None, r"labels \(5,\)"),
        ((4, 3), (4, 1), (5, 3), None, r"labels \(4, 1\)"),
        ((4, 3), (4,), (5, 3), torch.zeros(3), r"row_m2 \(3,\)"),
    ],
)
def test_shapes_that_do_not_belong_together_are_named(
    embeddings: Any, labels: Any, centers: Any, row_m2: Tensor | None, said: str
) -> None:
    problem = torch.ones(embeddings), torch.zeros(labels, dtype=torch.int64), torch.ones(centers)
    with pytest.raises(ValueError, match=said):
        margin_softmax(*problem, ARCFACE, row_m2=row_m2)


@pytest.mark.parametrize("product_dtype", [None, torch.float16])
def test_the_embeddings_gradient_alone_takes_no_second_pass(
    product_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = random_problem(5, batch=6, classes=11, dtype=torch.float32)
    embeddings, centers = problem.embeddings.requires_grad_(), problem.centers.requires_grad_()
    loss = margin_softmax(*problem, ARCFACE, product_dtype=product_dtype)
    wanted, _ = torch.autograd.grad(loss, [embeddings, centers], retain_graph=True)

    def refused(*arguments: object) -> Tensor:
        raise AssertionError("a second pass over the classes")

    monkeypatch.setattr(margin_softmax_module, "gradient_in_centers", refused)
    with in_embeddings_alone():
        (met,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
    assert torch.equal(met, wanted)
    with pytest.raises(AssertionError, match="second pass"):
        loss.backward()
