"""Margin softmax in one process: values and gradients against the dense twin, precision, corner cases."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace

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
from tests.reference.margin_softmax import dense_margin_softmax
from tests.reference.problems import ARCFACE, COMBINED, MARGINS, Problem, random_problem

CHUNKS = [1, 7, None]


def differentiate(loss_of: Callable[[Tensor, Tensor], Tensor], problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient in the embeddings, gradient in the centers)."""
    embeddings = problem.embeddings.clone().requires_grad_()
    centers = problem.centers.clone().requires_grad_()
    loss = loss_of(embeddings, centers)
    in_embeddings, in_centers = torch.autograd.grad(loss, [embeddings, centers])
    return loss.detach(), in_embeddings, in_centers


def twin(problem: Problem, margin: Margin, index: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return differentiate(lambda e, c: dense_margin_softmax(e, problem.labels, c, margin, index), problem)


def ours(
    problem: Problem,
    margin: Margin,
    index: Tensor | None = None,
    chunk: int | None = None,
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    def loss_of(embeddings: Tensor, centers: Tensor) -> Tensor:
        return margin_softmax(
            embeddings, problem.labels, centers, margin, index=index, chunk=chunk, product_dtype=product_dtype
        )

    return differentiate(loss_of, problem)


def assert_equal(met: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    for name, a, b in zip(("loss", "embeddings", "centers"), met, wanted, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), f"{name}: off by {(a - b).abs().max():.2e}"


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", MARGINS)
def test_loss_and_gradients_equal_the_dense_twin(name: str, sampled: bool, chunk: int | None) -> None:
    """Half of the labels are outside the sampled index: targets take part all the same, and pull their center."""
    problem = random_problem(seed=1)
    index = torch.arange(0, 23, 2) if sampled else None
    met, wanted = ours(problem, MARGINS[name], index, chunk), twin(problem, MARGINS[name], index)
    assert_equal(met, wanted)
    assert wanted[1].abs().max() > 1e-3


@pytest.mark.parametrize("chunk", [7, None])
@pytest.mark.parametrize("name", ["arcface", "cosface", "combined-filtered"])
def test_a_margin_for_each_row_is_that_margin_in_the_twin(name: str, chunk: int | None) -> None:
    """Some rows without any margin, some beyond the turn; those without a label count for nothing."""
    problem, index = random_problem(seed=1), torch.arange(0, 23, 2)
    row_m2 = torch.linspace(0, 1.5, 12, dtype=torch.float64).flip(0)
    met = differentiate(
        lambda e, c: margin_softmax(e, problem.labels, c, MARGINS[name], index=index, chunk=chunk, row_m2=row_m2),
        problem,
    )

    def row_by_row(embeddings: Tensor, centers: Tensor) -> Tensor:
        losses = [
            dense_margin_softmax(
                embeddings[i : i + 1],
                problem.labels[i : i + 1],
                centers,
                replace(MARGINS[name], m2=float(m2)),
                index,
            )
            for i, m2 in enumerate(row_m2)
        ]
        return torch.stack(losses).sum() / (problem.labels >= 0).sum()

    assert_equal(met, differentiate(row_by_row, problem))
    assert float((met[0] - ours(problem, MARGINS[name], index)[0]).abs()) > 0.1


def test_equal_margins_for_all_rows_are_the_margin_and_get_no_gradient() -> None:
    problem = random_problem(seed=2, dtype=torch.float32)
    row_m2 = torch.full((12,), 0.5, requires_grad=True)
    met = differentiate(lambda e, c: margin_softmax(e, problem.labels, c, ARCFACE, row_m2=row_m2), problem)
    assert_equal(met, ours(problem, ARCFACE), 1e-5)
    assert row_m2.grad is None


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
    assert_equal(ours(problem, MARGINS[name], index, chunk), twin(problem, MARGINS[name], index), 1e-9)


@pytest.mark.parametrize("weight_wants_gradient", [False, True])
def test_a_second_derivative_is_refused_and_not_silently_wrong(weight_wants_gradient: bool) -> None:
    problem = random_problem(seed=1)
    embeddings = problem.embeddings.requires_grad_()
    weight = torch.ones((), dtype=torch.float64, requires_grad=weight_wants_gradient)
    loss = weight * margin_softmax(embeddings, problem.labels, problem.centers, ARCFACE)
    (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
        gradient.sum().backward()


# ---- corner cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MARGINS)
def test_huge_logit_scale_and_underflow_stay_finite_and_right(name: str, dtype: torch.dtype) -> None:
    """s = 512: a row's exponentials span e^1000, most of them 0 in any format."""
    base = MARGINS[name]
    margin = Margin(512.0, base.m1, base.m2, base.m3, base.filter_threshold)
    problem = random_problem(7, dtype=dtype)
    met = ours(problem, margin, chunk=5)
    wanted = twin(Problem(problem.embeddings.double(), problem.labels, problem.centers.double()), margin)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3
    for a, b in zip(met, wanted, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [30.0, 64.0, 65.0, 80.0])
def test_fp32_holds_the_largest_and_the_smallest_logits_in_one_batch(scale: float) -> None:
    """All classes lie in one direction; one row looks along it and one against it: their exponentials differ by e^128.

    Up to a scale of 64 they are taken of the bare logits, beyond it less a running maximum.
    """
    generator = torch.Generator().manual_seed(0)
    direction = torch.ones(8)
    centers = direction + 0.05 * torch.randn(30, 8, generator=generator)
    tilt = 0.2 * torch.randn(2, 8, generator=generator)
    embeddings = torch.stack([direction + tilt[0], -direction + tilt[1]])
    labels = torch.tensor([3, 4])
    for margin in (Margin(scale, 1.0, 0.0, 0.0), Margin(scale, 1.0, 0.5, 0.0)):
        truth = twin(Problem(embeddings.double(), labels, centers.double()), margin)
        for row in (0, 1):
            alone = torch.where(torch.arange(2) == row, labels, -1)
            part = twin(Problem(embeddings.double(), alone, centers.double()), margin)[2] / 2
            assert part.norm() > 0.05 * truth[2].norm(), "a row that hardly moves the centers could be lost unseen"
        for a, b in zip(ours(Problem(embeddings, labels, centers), margin, chunk=7), truth, strict=True):
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
def test_centers_of_zero_norm_have_cosine_0(dtype: torch.dtype) -> None:
    problem = random_problem(8, dtype=dtype)
    problem.centers[problem.labels[0]] = 0  # a target
    problem.centers[(problem.labels.max() + 1) % 23] = 0
    met, wanted = ours(problem, ARCFACE, chunk=4), twin(problem, ARCFACE)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for a, b in zip(met, wanted, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_embeddings_of_zero_norm_are_finite() -> None:
    problem = random_problem(8)
    problem.embeddings[0] = 0
    assert all(values.isfinite().all() for values in ours(problem, ARCFACE))


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_rows_without_label_count_for_nothing(chunk: int | None) -> None:
    problem = random_problem(9)
    kept = problem.labels >= 0
    assert not kept.all()
    alone = Problem(problem.embeddings[kept], problem.labels[kept], problem.centers)
    met, wanted = ours(problem, ARCFACE, chunk=chunk), ours(alone, ARCFACE, chunk=chunk)
    torch.testing.assert_close(met[0], wanted[0])
    torch.testing.assert_close(met[1][kept], wanted[1])
    torch.testing.assert_close(met[2], wanted[2])
    assert (met[1][~kept] == 0).all()


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("name", MARGINS)
def test_a_batch_without_any_label_has_loss_and_gradients_0(name: str, batch: int) -> None:
    problem = random_problem(9, batch=batch)
    problem = problem._replace(labels=torch.full((batch,), -1))
    for values in ours(problem, MARGINS[name]):
        assert (values == 0).all()


@pytest.mark.parametrize("name", MARGINS)
def test_one_class(name: str) -> None:
    """Nothing to tell apart: loss and gradients are 0, not nan."""
    problem = random_problem(10, batch=1, classes=1)
    for values in ours(problem, MARGINS[name]):
        assert (values == 0).all()


@pytest.mark.parametrize("given_norms", [False, True])
@pytest.mark.parametrize("index", [None, torch.tensor([1, 2, 5, 22])], ids=["all", "sampled"])
def test_norms_that_the_caller_keeps_change_nothing(given_norms: bool, index: Tensor | None) -> None:
    problem = random_problem(11)
    norms = inverse_norm(problem.centers) if given_norms else None
    embeddings = problem.embeddings.clone().requires_grad_()
    loss = margin_softmax(
        embeddings, problem.labels, problem.centers, COMBINED, inverse_norms=norms, index=index, chunk=4
    )
    (gradient,) = torch.autograd.grad(loss, embeddings)
    wanted = twin(problem, COMBINED, index)
    torch.testing.assert_close(loss.detach(), wanted[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, wanted[1], rtol=1e-10, atol=1e-10)


def test_non_contiguous_inputs_are_taken_without_a_warning() -> None:
    problem, index = random_problem(12), torch.arange(0, 23, 2)
    spread = Problem(
        torch.stack([problem.embeddings, problem.embeddings], 2)[..., 0],
        torch.stack([problem.labels, problem.labels], 1)[:, 1],
        problem.centers.T.contiguous().T,
    )
    strided = torch.stack([index, index], 1)[:, 0]
    assert not any(t.is_contiguous() for t in (*spread, strided))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        met = differentiate(
            lambda e, c: margin_softmax(
                torch.stack([e, e], 2)[..., 0], spread.labels, c.T.contiguous().T, ARCFACE, index=strided, chunk=5
            ),
            problem,
        )
    assert_equal(met, twin(problem, ARCFACE, index))


def test_a_shard_that_holds_no_target_and_an_empty_sample() -> None:
    """Both shards of a two-way split in one process: what each of them contributes alone is finite."""
    problem = random_problem(13)
    labels = torch.zeros_like(problem.labels)
    loss = margin_softmax(
        problem.embeddings.requires_grad_(),
        labels,
        problem.centers,
        ARCFACE,
        index=torch.empty(0, dtype=torch.int64),
    )
    loss.backward()
    assert loss == 0
    assert problem.embeddings.grad is not None
    assert (problem.embeddings.grad == 0).all()


def test_inputs_are_left_as_they_were() -> None:
    problem = random_problem(14)
    before = copy.deepcopy(problem)
    ours(problem, MARGINS["combined-filtered"], index=torch.arange(3, 20), chunk=4)
    for a, b in zip(problem, before, strict=True):
        assert torch.equal(a, b)


def test_frozen_centers_may_move_between_forward_and_backward() -> None:
    """As they do when a trainer calls the head twice before it goes back."""
    problem = random_problem(15)
    wanted = twin(problem, ARCFACE)[1]
    embeddings, centers = problem.embeddings.clone().requires_grad_(), problem.centers.clone()
    loss = margin_softmax(embeddings, problem.labels, centers, ARCFACE)
    centers.zero_()
    loss.backward()
    assert embeddings.grad is not None
    torch.testing.assert_close(embeddings.grad, wanted, rtol=1e-10, atol=1e-10)


def test_nothing_of_the_size_of_the_logits_is_kept_for_frozen_centers() -> None:
    problem = random_problem(16, batch=8, classes=5000)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        margin_softmax(problem.embeddings.requires_grad_(), problem.labels, problem.centers, ARCFACE)
    assert kept == [(8, 6)]


def test_gradients_reach_only_who_asks() -> None:
    problem = random_problem(17)
    wanted = twin(problem, ARCFACE)
    centers = problem.centers.clone().requires_grad_()
    margin_softmax(problem.embeddings, problem.labels, centers, ARCFACE).backward()
    torch.testing.assert_close(centers.grad, wanted[2], rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        loss = margin_softmax(problem.embeddings, problem.labels, centers, ARCFACE)
    assert not loss.requires_grad


@pytest.mark.parametrize(
    ("embeddings", "labels", "centers", "said"),
    [
        ((4, 3), (4,), (5, 2), r"embeddings \(4, 3\) and centers \(5, 2\)"),
        ((4,), (4,), (5, 4), r"embeddings \(4,\)"),
        ((4, 3), (5,), (5, 3), r"labels \(5,\)"),
        ((4, 3), (4, 1), (5, 3), r"labels \(4, 1\)"),
    ],
)
def test_shapes_that_do_not_belong_together_are_named(
    embeddings: tuple[int, ...], labels: tuple[int, ...], centers: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        margin_softmax(torch.ones(embeddings), torch.zeros(labels, dtype=torch.int64), torch.ones(centers), ARCFACE)


def test_margins_that_are_not_one_a_row_are_named() -> None:
    problem = random_problem(18)
    with pytest.raises(ValueError, match=r"row_m2 \(3,\) must be one a row of embeddings \(12, 6\)"):
        margin_softmax(problem.embeddings, problem.labels, problem.centers, ARCFACE, row_m2=torch.zeros(3))


@pytest.mark.parametrize("product_dtype", [None, torch.float16])
def test_the_embeddings_gradient_alone_takes_no_second_pass(
    product_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = random_problem(5, batch=6, classes=11, dtype=torch.float32)
    embeddings, centers = problem.embeddings.requires_grad_(), problem.centers.requires_grad_()
    loss = margin_softmax(embeddings, problem.labels, centers, ARCFACE, product_dtype=product_dtype)
    wanted, _ = torch.autograd.grad(loss, [embeddings, centers], retain_graph=True)

    def refused(*arguments: object) -> Tensor:
        raise AssertionError("a second pass over the classes")

    monkeypatch.setattr(margin_softmax_module, "gradient_in_centers", refused)
    with in_embeddings_alone():
        (met,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
    assert torch.equal(met, wanted)
    with pytest.raises(AssertionError, match="second pass"):
        loss.backward()
