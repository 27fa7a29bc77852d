"""The learned classifier against arcface_torch's own head, or against a dense twin of it.

Providers:
    arcface_kd: :class:`arcface_kd.methods.learned_classifier.LearnedClassifier`, forward and backward.
    arcface_torch: ``PartialFC_V2`` at sample_rate 1 under ``CombinedMarginLoss``, when ``ARCFACE_TORCH`` names a
        checkout of ``insightface/recognition/arcface_torch``; one process, on nccl as the host runs it; where there is
        no GPU on gloo, its ``.cuda()`` calls without effect.
    dense_twin: :class:`benchmarks.dense_heads.DenseClassifier`, otherwise.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor, distributed
from torch.nn.functional import normalize

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.learned_classifier import LearnedClassifier
from benchmarks.dense_heads import DenseClassifier
from benchmarks.peak_memory import can_measure, peak_mb
from benchmarks.record import Recorder, Row, print_table, print_verdict, size
from benchmarks.timing import interleaved_seconds

MARGIN = Margin(64.0, 1.0, 0.5, 0.0)


@dataclass(frozen=True)
class Sizes:
    """What is measured: C (MS1MV2), B, D and the number of rounds."""

    classes: int = 85_742
    batch: int = 256
    dimension: int = 512
    rounds: int = 7


TINY = Sizes(600, 16, 8, 1)


def _classifier(sizes: Sizes, device: torch.device) -> LearnedClassifier:
    context = RunContext(
        num_classes=sizes.classes,
        embedding_size=sizes.dimension,
        margin=MARGIN,
        ranks=RankGroup(alone=True),
    )
    return LearnedClassifier(context).to(device)


def _step_of(loss_of: Callable[[Tensor, Tensor], Tensor], weight: Tensor, sizes: Sizes) -> Callable[[], Tensor]:
    """One forward and backward pass of a head; returns the loss, for which a GPU is not waited."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(sizes.classes, (sizes.batch,), generator=generator).to(weight.device)
    noise = torch.randn(sizes.batch, sizes.dimension, generator=generator).to(weight.device)
    # Half learned: the host cuts losses off at log 1e30, which untrained embeddings of a few dimensions can pass.
    embeddings = (normalize(noise) + normalize(weight.detach()[labels])).requires_grad_()

    def step() -> Tensor:
        embeddings.grad = weight.grad = None
        loss = loss_of(embeddings, labels)
        loss.backward()
        return loss.detach()

    return step


def _loss_of(head: LearnedClassifier, batch: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda embeddings, labels: head(Batch(embeddings, embeddings, labels, None, [batch], 0))["ce"]


def arcface_kd_step(sizes: Sizes, device: torch.device) -> Callable[[], Tensor]:
    """Provider ``arcface_kd``."""
    head = _classifier(sizes, device)
    return _step_of(_loss_of(head, sizes.batch), head.weight, sizes)


def dense_twin_step(sizes: Sizes, device: torch.device) -> Callable[[], Tensor]:
    """Provider ``dense_twin``."""
    head = DenseClassifier(_classifier(sizes, device).weight, MARGIN.scale, MARGIN.m2)
    return _step_of(head, head.weight, sizes)


def arcface_torch_step(sizes: Sizes, device: torch.device, checkout: Path) -> Callable[[], Tensor]:
    """Provider ``arcface_torch``; opens a process group of one, and lets the host believe in a GPU, for good."""
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    margin_loss = _module(checkout / "losses.py").CombinedMarginLoss(MARGIN.scale, MARGIN.m1, MARGIN.m2, MARGIN.m3)
    host = _module(checkout / "partial_fc_v2.py").PartialFC_V2(margin_loss, sizes.dimension, sizes.classes, 1.0, False)
    host.weight.data.copy_(_classifier(sizes, torch.device("cpu")).weight.data)
    host.to(device)
    step = _step_of(host, host.weight, sizes)

    def step_without_cuda() -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of calls that torch has renamed since
            if device.type != "cuda":
                stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor))
            return step()

    return step_without_cuda


@contextmanager
def no_process_group_left() -> Iterator[None]:
    """Close the process group that the host's head was given."""
    try:
        yield
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _module(path: Path) -> ModuleType:
    """A file of the host as a module, without its folder on the path."""
    if not path.is_file():
        raise FileNotFoundError(
            f"ARCFACE_TORCH names {path.parent}, which has no {path.name}; it should name recognition/arcface_torch"
        )
    specification = importlib.util.spec_from_file_location(f"arcface_torch_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        specification.loader.exec_module(module)
    return module


def run(sizes: Sizes, device: torch.device) -> list[Row]:
    """Compare seconds and peak memory, print the table and return the rows.

    Raises:
        RuntimeError: the two heads find different losses, so that they cannot be compared.
    """
    recorder = Recorder("learned", device)
    where = size(sizes.classes, sizes.batch, sizes.dimension)
    folder = os.environ.get("ARCFACE_TORCH")
    other, make = "dense_twin", partial(dense_twin_step, sizes, device)
    if folder:
        other, make = "arcface_torch", partial(arcface_torch_step, sizes, device, Path(folder).resolve())
    else:
        print("\nlearned: ARCFACE_TORCH is not set; a dense twin stands in for the host's head")
    with no_process_group_left():
        steps = {"arcface_kd": arcface_kd_step(sizes, device), other: make()}
        losses = {name: float(step()) for name, step in steps.items()}
        if abs(losses["arcface_kd"] - losses[other]) > 1e-3 * (1 + abs(losses[other])):
            raise RuntimeError(f"the heads do not compute the same: their losses are {losses}")
        seconds = interleaved_seconds(steps, sizes.rounds, device)
        del steps
    peaks: dict[str, float] = {}
    if can_measure(device):
        peaks["arcface_kd"] = peak_mb(arcface_kd_step, device, sizes, device)
        peaks[other] = peak_mb(make, device)
    for name, value in seconds.items():
        recorder.add(name, where, "seconds", value)
    for name, value in peaks.items():
        recorder.add(name, where, "peak_mb", value)
    ratio = seconds["arcface_kd"] / seconds[other]
    print_table(
        f"learned: one step, {where}, median of {sizes.rounds} rounds; peak above the classifier, with its gradient",
        ["provider", "seconds", f"/ {other}", "peak MB"],
        [
            [name, f"{value:.4f}", f"{value / seconds[other]:.2f}", f"{peaks[name]:.0f}" if name in peaks else "-"]
            for name, value in seconds.items()
        ],
    )
    print_verdict(f"never slower than {other}", f"{ratio:.3f} of it", ratio <= 1)
    return recorder.rows
