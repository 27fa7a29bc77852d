"""Functions that a GPU runs as kernels of their own: the same numbers, and kernels that compile."""

import functools
import importlib.util
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arcface_kd.losses import angle_sums, fused, narrow_products
from arcface_kd.losses.class_chunks import unit_rows
from arcface_kd.losses.class_weights import ClassWeights, inverse_norm
from arcface_kd.losses.margin import Margin
from arcface_kd.losses.margin_softmax import sharded_margin_softmax
from arcface_kd.methods.base import Batch
from tests.distillation.test_launches import CASES, head_of

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("how", ["interpret", "compile"])
def test_triton_kernels(how: str) -> None:
    """In the interpreter they find what torch's own operations find; the compiler takes them for three GPUs."""
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if how == "interpret" else {})
    command = [sys.executable, "-m", "tests.losses.kernel_checks", how]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("good\n")


@functools.cache
def _as_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor counts as one on a GPU, and what is fused there is traced and run as one graph."""

    def as_graph(function: Callable[..., Any], kernels: int, kernel: object) -> Callable[..., Any]:
        return _as_graph(function)

    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True), raising=False)
    monkeypatch.setattr(fused, "on_gpu", as_graph)
    # These have kernels written by hand, which the test above is for.
    for module in (narrow_products, angle_sums):
        monkeypatch.setattr(module, "on_gpu", lambda function, kernels, kernel: function)
    # Methods share functions, and each asks them for other forms: with or without a shift, a threshold, a target.
    with torch._dynamo.config.patch(recompile_limit=64), warnings.catch_warnings():
        # The compiler's own are not ours.
        warnings.simplefilter("ignore")
        yield


def _results(name: str, options: dict[str, object], folder: Path, sample_rate: float) -> list[Tensor]:
    """Terms, gradients and buffers of two steps of a method alone, on batches of two sizes."""
    torch.manual_seed(0)
    head = head_of(name, options, folder, sample_rate=sample_rate)
    found = []
    for step, rows in enumerate((12, 9)):
        teacher = torch.nn.functional.normalize(torch.randn(rows, 16))
        student = (teacher + torch.randn(rows, 16) / 3).requires_grad_()
        maps = torch.randn(rows, 6, 7, 7).requires_grad_(), torch.randn(rows, 8, 7, 7)
        labels = torch.randint(-1, 600, (rows,))
        labels[1] = labels[0]
        batch = Batch(student, student, labels, teacher, [rows], step, *maps)
        terms = [term for method in head.methods.values() for term in method(batch).values()]
        torch.stack(terms).sum().backward()
        assert student.grad is not None
        found += [*(term.detach() for term in terms), student.grad]
        found += [parameter.grad.clone() for parameter in head.parameters() if parameter.grad is not None]
    return [*found, *(value.clone() for value in head.buffers() if value.is_floating_point())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "sample_rate"),
    [*((*case, 1.0) for case in CASES), ("adadistill", {}, 0.3), ("kd", {}, 0.3)],
    ids=str,
)
def test_fused_functions_are_one_graph_each_and_change_nothing(
    name: str, options: dict[str, object], sample_rate: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    wanted = _results(name, options, tmp_path, sample_rate)
    request.getfixturevalue("compiled")
    met = _results(name, options, tmp_path, sample_rate)
    assert len(met) == len(wanted)
    # align_scale takes each channel's mean away: CrossKD's adapter has a bias without gradient, but for the rounding of
    # sums up to 30.
    bound = 5e-5 if name == "crosskd" else 1e-5
    for a, b in zip(met, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=bound)


def _doubled(values: Tensor) -> Tensor:
    return values * 2


def _halved(values: Tensor) -> Tensor:
    return values / 2


def test_without_a_compiler_torch_s_own_kernels_are_taken_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify it")

    fused._compiles.cache_clear()
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert fused.on_gpu(_doubled, 1, None) is _doubled
            assert fused.on_gpu(_doubled, 1, _halved) is _doubled
    fused._compiles.cache_clear()
    assert [record.message.count("Failed to find C compiler") for record in caplog.records] == [1]


def test_a_function_that_does_not_compile_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*arguments: object) -> None:
        raise AssertionError

    fused._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **settings: refused)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert fused._compiled(_doubled)(torch.ones(2)).tolist() == [2, 2]
    fused._compiled.cache_clear()
    assert len(caplog.records) == 1


# ---- products of narrow factors


def _gradient(dtype: torch.dtype | None, classes: int, chunk: int | None = None) -> Tensor:
    """The gradient of embeddings that are nearly as near to three other classes as to their own, frozen ones."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, 512, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (32,), generator=generator)
    others = torch.randint(0, classes, (32, 3), generator=generator)
    noise = torch.randn(32, 512, generator=generator, dtype=torch.float64)
    embeddings = centers[labels] + 0.9 * centers[others].sum(1) + 0.5 * noise
    if dtype is not None:
        centers, embeddings = centers.float(), embeddings.float()
    embeddings.requires_grad_()
    units = None if dtype is None else unit_rows(centers, inverse_norm(centers).unsqueeze(1), dtype)
    weights = ClassWeights(centers, product_dtype=dtype, units=units)
    sharded_margin_softmax(embeddings, labels, weights, Margin(64.0, 1.0, 0.5, 0.0), chunk=chunk).backward()
    assert embeddings.grad is not None
    return embeddings.grad.double()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
def test_a_narrow_head_s_gradient_is_near_the_truth(dtype: torch.dtype, bound: float) -> None:
    truth = _gradient(None, 40_000)
    error = (_gradient(dtype, 40_000) - truth).norm() / truth.norm()
    assert error <= bound


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_of_a_narrow_head_change_little(chunk: int) -> None:
    whole = _gradient(torch.float16, 200, 200)
    assert (_gradient(torch.float16, 200, chunk) - whole).norm() <= 2e-3 * whole.norm()
