"""Margin softmax in narrow number formats, judged against the fp64 truth."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.losses.class_chunks import aligned_chunks
from arcface_kd.losses.margin import Margin
from arcface_kd.losses.margin_softmax import margin_softmax
from tests.losses.test_margin_softmax import ours, truth, twin
from tests.reference.compare import differentiated
from tests.reference.problems import ARCFACE, MARGINS, random_problem


def _distances(met: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> Tensor:
    """How far (loss, embedding gradient, center gradient) are from the truth."""
    return torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(met, wanted, strict=True)])


@pytest.mark.parametrize("product_dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("phase", ["first steps", "half way", "converged"])
@pytest.mark.parametrize("name", ["arcface", "cosface", "combined"])
def test_precision_is_no_worse_than_the_naive_computation(
    name: str, phase: str, product_dtype: torch.dtype | None
) -> None:
    """Rounding is a lottery, so means over eight batches are compared: a tenth of leeway, two units of the result."""
    bound = {None: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}[product_dtype]
    lean = {"first steps": 0.0, "half way": 5.0, "converged": 40.0}[phase]
    met, naive = torch.zeros(3), torch.zeros(3)
    for seed in range(8):
        problem = random_problem(seed, batch=48, classes=1000, dimension=64, dtype=torch.float32)
        own = normalize(problem.centers[problem.labels.clamp_min(0)])
        problem = problem._replace(embeddings=problem.embeddings + lean * own)
        wanted = truth(problem, MARGINS[name])
        met += _distances(ours(problem, MARGINS[name], product_dtype=product_dtype, chunk=300), wanted) / 8
        naive += _distances(twin(problem, MARGINS[name], None, product_dtype), wanted) / 8
    # In bf16 the naive cosine of a converged row rounds to 1, where acos has no finite gradient.
    naive = naive.nan_to_num(nan=torch.inf)
    assert (met <= 1.1 * naive + 2 * torch.finfo(torch.float32).eps).all(), f"ours {met}, naive {naive}"
    assert (met < bound).all(), f"ours {met}"


def test_fp32_keeps_the_small_loss_of_a_confident_row() -> None:
    """Where p_y is 1 to the last digit, loss and gradient are the other classes' small share, not a cancelled 0."""
    problem = random_problem(3, batch=1, classes=40, dimension=32, dtype=torch.float32)
    problem = problem._replace(embeddings=normalize(problem.centers[problem.labels]) + 0.02)
    plain = Margin(32.0, 1.0, 0.0, 0.0)
    wanted = truth(problem, plain)
    assert 1e-10 < wanted[0] < 3e-8
    assert (_distances(ours(problem, plain), wanted) <= 1e-4).all()


@pytest.mark.parametrize("batch", [2, 64])
def test_fp16_products_survive_a_loss_scaled_for_fp16(batch: int) -> None:
    """GradScaler begins at 65536, which times the logit scale is beyond fp16."""
    problem = random_problem(2, batch=batch, classes=200, dimension=16, dtype=torch.float32)
    plain, scaled = (
        differentiated(
            lambda e, c, f=factor: (
                f * margin_softmax(e, problem.labels, c, ARCFACE, product_dtype=torch.float16, chunk=64)
            ),
            *(problem.embeddings, problem.centers),
        )
        for factor in (1.0, 65536.0)
    )
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a * 65536.0, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_embeddings_get_a_fp32_loss_and_a_gradient_of_their_own_format(dtype: torch.dtype) -> None:
    problem = random_problem(4, batch=16, classes=50, dimension=16, dtype=torch.float32)
    half = problem._replace(embeddings=problem.embeddings.to(dtype))
    loss, gradient, _ = ours(half, ARCFACE)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    exact = twin(problem._replace(embeddings=half.embeddings.float()), ARCFACE)
    torch.testing.assert_close(loss, exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.float(), exact[1], rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("learned", [False, True], ids=["frozen", "learned"])
def test_an_enclosing_autocast_changes_nothing(learned: bool) -> None:
    """Neither around the forward nor around the backward pass."""
    problem = random_problem(6, batch=16, classes=50, dimension=16, dtype=torch.float32)

    def run() -> tuple[Tensor, ...]:
        if learned:
            return ours(problem, ARCFACE)
        return differentiated(lambda e: margin_softmax(e, *problem[1:], ARCFACE), problem.embeddings)

    wanted = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(), wanted, strict=True))


@given(classes=st.integers(0, 20_000), chunk=st.integers(1, 9000))
def test_chunks_tile_the_classes_in_sixteens(classes: int, chunk: int) -> None:
    found = list(aligned_chunks(classes, chunk))
    assert [place for part in found for place in range(part.start, part.stop)] == list(range(classes))
    sizes = [part.stop - part.start for part in found]
    assert all(0 < size <= max(1.5 * chunk, 1) for size in sizes)
    assert all(size == sizes[0] for size in sizes[:-1])
    if sizes and sizes[0] >= 1024:
        assert sizes[0] % 16 == 0
