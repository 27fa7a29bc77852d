"""Readiness for GPUs: one graph without data-dependent branches; on a GPU no wait and the same numbers.

Without a GPU, tests/distillation/test_launches.py sees that no step waits.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin import Margin
from arcface_kd.losses.margin_softmax import margin_softmax
from arcface_kd.methods.adadistill import AdaDistill, AdaDistillConfig
from arcface_kd.methods.base import Batch, Method, RunContext
from arcface_kd.methods.ekd import EKD, EKDConfig
from arcface_kd.methods.embedding import EmbeddingConfig, EmbeddingDistillation
from arcface_kd.methods.learned_classifier import LearnedClassifier
from arcface_kd.methods.margindistillation import MarginDistillation, MarginDistillationConfig
from arcface_kd.methods.rkd import RKD, RKDConfig
from tests.reference.compare import assert_equal, differentiated
from tests.reference.problems import ARCFACE, MARGINS, random_problem

METHODS: dict[str, Callable[[RunContext], Method]] = {
    "adadistill": lambda context: AdaDistill(AdaDistillConfig(), context),
    "classifier": LearnedClassifier,
    "ekd": lambda context: EKD(EKDConfig(), context),
    "embedding": lambda context: EmbeddingDistillation(EmbeddingConfig(), context),
    "margindistillation": lambda context: MarginDistillation(MarginDistillationConfig(), context),
    "rkd": lambda context: RKD(RKDConfig(), context),
}
FORMATS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: torch.cuda.is_available() is False")
    return torch.device("cuda")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("name", "sampled", "product_dtype"),
    [("arcface", False, None), ("arcface-steep", True, torch.float16), ("combined-filtered", True, torch.bfloat16)],
)
def test_loss_and_gradients_compile_into_one_graph(
    name: str, sampled: bool, product_dtype: torch.dtype | None, backend: str
) -> None:
    """No branch on data and no step back to Python: ``fullgraph`` refuses both."""
    problem = random_problem(1, batch=6, classes=11, dtype=torch.float32)
    index = torch.arange(0, 11, 2) if sampled else None

    def loss_of(embeddings: Tensor, centers: Tensor) -> Tensor:
        return margin_softmax(
            embeddings, problem.labels, centers, MARGINS[name], index=index, chunk=4, product_dtype=product_dtype
        )

    torch.compiler.reset()
    with warnings.catch_warnings():
        # The compiler's own warnings are not ours.
        warnings.simplefilter("ignore")
        met = differentiated(
            torch.compile(loss_of, fullgraph=True, backend=backend), problem.embeddings, problem.centers
        )
    torch.compiler.reset()
    assert_equal(met, differentiated(loss_of, problem.embeddings, problem.centers), 1e-5)


def _batch(rows: int, dimension: int, classes: int, device: torch.device | str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(rows, dimension, generator=generator).to(device).requires_grad_()
    teacher = torch.nn.functional.normalize(torch.randn(rows, dimension, generator=generator)).to(device)
    labels = torch.randint(-1, classes, (rows,), generator=generator).to(device)
    return Batch(embeddings, embeddings, labels, teacher, [rows], 0)


def _context(classes: int, dimension: int, sample_rate: float, product_dtype: torch.dtype | None) -> RunContext:
    return RunContext(
        num_classes=classes,
        embedding_size=dimension,
        teacher_embedding_size=dimension,
        margin=Margin(64.0, 1.0, 0.5, 0.0, filter_threshold=0.4),
        ranks=RankGroup(alone=True),
        sample_rate=sample_rate,
        product_dtype=product_dtype,
        teacher_classifier=torch.randn(classes, dimension, generator=torch.Generator().manual_seed(1)),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("product_dtype", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits_for_the_gpu(
    method: str, sample_rate: float, product_dtype: torch.dtype | None, cuda: torch.device
) -> None:
    head = METHODS[method](_context(5000, 64, sample_rate, product_dtype)).to(cuda)
    batch = _batch(128, 64, 5000, cuda)
    # The first step compiles kernels.
    torch.stack(list(head(batch).values())).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = torch.stack(list(head(batch).values())).sum()
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("product_dtype", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("name", MARGINS)
def test_the_gpu_finds_the_numbers_of_the_cpu(
    name: str, product_dtype: torch.dtype | None, autocast: bool, cuda: torch.device
) -> None:
    problem = random_problem(3, batch=32, classes=700, dimension=64, dtype=torch.float32)

    def run(device: torch.device) -> list[Tensor]:
        embeddings, labels, centers = (each.to(device) for each in problem)
        keys: dict[str, Any] = {"product_dtype": product_dtype, "chunk": 256}
        with torch.autocast(device.type, enabled=autocast and device.type == "cuda", dtype=torch.float16):
            found = differentiated(
                lambda e, c: margin_softmax(e, labels, c, MARGINS[name], **keys), embeddings, centers
            )
        return [each.cpu() for each in found]

    tolerance = 1e-4 if product_dtype is None else 5e-2
    for a, b in zip(run(cuda), run(torch.device("cpu")), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.gpu
def test_memory_on_the_gpu_does_not_grow_with_the_classes(cuda: torch.device) -> None:
    peaks = []
    for classes in (50_000, 400_000):
        centers = torch.randn(classes, 128, device=cuda)
        embeddings = torch.randn(512, 128, device=cuda, requires_grad=True)
        labels = torch.randint(classes, (512,), device=cuda)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        margin_softmax(embeddings, labels, centers, ARCFACE).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del centers
    assert peaks[1] <= 1.05 * peaks[0]
