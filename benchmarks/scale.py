"""WebFace42M on 8 and 32 GPUs: one rank's share, computed on paper and run on this machine.

One rank holds ceil(2,059,906 / N) classes and sees the gathered batch of N x 128 rows. Our head runs as that rank, with
collectives that bring made-up rows instead of asking anybody (:class:`OneRank`). What a rank of each head holds,
multiplies and sends is computed from these formulas: N ranks, b rows a rank, B = N b rows in all, C classes,
K = C / N classes a rank, dimension D, 4 bytes a number, r = (N - 1) / N (what a ring sends of its data).

arcface_kd, AdaDistill with frozen centers, sharded:
    state         4 K (D + 1)                 centers and one over their norms
    working       4 B (chunk + 8 D)           a chunk's logits; embeddings, teacher's, gradients
    operations    4 B K D                     two products
    sent          r B (8 D + 8)               all-gather of student's and teacher's embeddings and of labels
                  + r B 4 D                   reduce-scatter of the embeddings' gradient
                  + 2 r 16 B                  all-reduce of cosines, maxima, targets and sums

PartialFC at sample_rate 1, arcface_torch's own head, without distillation:
    state         12 K D                      weight, gradient, momentum
    working       4 (K D + 4 B K)             normalised weight; logits: two matrices are kept from the forward for the
                                              backward pass, which holds two more
    operations    6 B K D                     three products
    sent          r B (4 D + 8)               all-gather of embeddings and labels
                  + r B 4 D                   the gradient, by N reductions to one rank each
                  + 2 r 12 B                  all-reduce of maxima, sums and losses

Published AdaDistill head, replicated on every rank under DistributedDataParallel:
    state         12 C D                      parameter, gradient, DDP's bucket
    working       4 (2 C D + 4 b C)           normalised parameter and its gradient; logits, at least four matrices
    operations    6 b C D                     three products
    sent          2 r 4 C D                   all-reduce of the gradient that nobody uses
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from arcface_kd.distributed.ranks import RankGroup, for_ddp
from arcface_kd.losses.class_chunks import chunk_size
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.adadistill import AdaDistill, AdaDistillConfig
from arcface_kd.methods.base import Batch, RunContext
from benchmarks.peak_memory import can_measure, peak_mb
from benchmarks.record import Recorder, Row, print_table, print_verdict, size
from benchmarks.timing import interleaved_seconds

MARGIN = Margin(64.0, 1.0, 0.45, 0.0)


@dataclass(frozen=True)
class Sizes:
    """The whole: classes C (WebFace42M), ranks N, rows b a rank, dimension D; and the number of timed rounds."""

    classes: int = 2_059_906
    ranks: tuple[int, ...] = (8, 32)
    rows: int = 128
    dimension: int = 512
    rounds: int = 3


TINY = Sizes(1201, (2, 3), 8, 8, 1)


@dataclass(frozen=True)
class Share:
    """What one rank of a head has to do with a step.

    Attributes:
        classes: classes that it holds.
        state: bytes that stay from step to step.
        working: bytes that a step takes besides.
        operations: floating-point operations of its matrix products.
        sent: bytes that it sends.
    """

    classes: int
    state: float
    working: float
    operations: float
    sent: float


def arcface_kd_share(classes: int, ranks: int, rows: int, dimension: int, device: torch.device) -> Share:
    """Our head's, by the formulas above; the chunk is that of the device."""
    shard, batch, r = math.ceil(classes / ranks), ranks * rows, (ranks - 1) / ranks
    return Share(
        classes=shard,
        state=4 * shard * (dimension + 1),
        working=4 * batch * (min(chunk_size(batch, device), shard) + 8 * dimension),
        operations=4 * batch * shard * dimension,
        sent=r * batch * (8 * dimension + 8) + r * batch * 4 * dimension + 2 * r * 16 * batch,
    )


def partial_fc_share(classes: int, ranks: int, rows: int, dimension: int) -> Share:
    """PartialFC's at sample_rate 1, by the formulas above."""
    shard, batch, r = math.ceil(classes / ranks), ranks * rows, (ranks - 1) / ranks
    return Share(
        classes=shard,
        state=12 * shard * dimension,
        working=4 * (shard * dimension + 4 * batch * shard),
        operations=6 * batch * shard * dimension,
        sent=r * batch * (4 * dimension + 8) + r * batch * 4 * dimension + 2 * r * 12 * batch,
    )


def published_share(classes: int, ranks: int, rows: int, dimension: int) -> Share:
    """The published AdaDistill head's, by the formulas above."""
    return Share(
        classes=classes,
        state=12 * classes * dimension,
        working=4 * (2 * classes * dimension + 4 * rows * classes),
        operations=6 * rows * classes * dimension,
        sent=2 * (ranks - 1) / ranks * 4 * classes * dimension,
    )


class OneRank(RankGroup):
    """Rank 0 of a world that is not there: its collectives cost their memory, and bring made-up rows.

    Args:
        world_size: number of ranks N.
        classes: labels of the other ranks are drawn from [0, classes).
    """

    def __init__(self, world_size: int, classes: int) -> None:
        super().__init__(alone=True)
        self.world_size = world_size
        self._classes = classes
        self._generator = torch.Generator().manual_seed(0)

    def sizes(self, size: int) -> list[int]:
        """Everybody has as many rows."""
        return [size] * self.world_size

    def gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """Own rows first, then random ones: labels for labels, unit vectors for embeddings."""
        gathered = rows.new_empty((sum(sizes), *rows.shape[1:]))
        own, others = gathered[: rows.shape[0]], gathered[rows.shape[0] :]
        own.copy_(rows.detach())
        if rows.is_floating_point():
            others.normal_(std=rows.shape[1] ** -0.5, generator=self._generator)
        else:
            others.random_(self._classes, generator=self._generator)
        return gathered

    def sum_rows(self, gathered: Tensor, sizes: list[int]) -> Tensor:
        """The other ranks add nothing."""
        return self.own_rows(gathered, sizes).clone()

    def sum_(self, values: Tensor) -> Tensor:
        """The other ranks add nothing."""
        return values

    def max_(self, values: Tensor) -> Tensor:
        """The other ranks hold the targets that are not here, at a cosine of 0."""
        return values.nan_to_num_(neginf=0.0)


def share_step(sizes: Sizes, ranks: int) -> Callable[[], Tensor]:
    """A step of rank 0 of ``ranks`` on the CPU: gather, AdaDistill, backward; it returns its own rows' gradient."""
    group = OneRank(ranks, sizes.classes)
    context = RunContext(
        num_classes=sizes.classes,
        embedding_size=sizes.dimension,
        teacher_embedding_size=sizes.dimension,
        margin=MARGIN,
        ranks=group,
    )
    head = AdaDistill(AdaDistillConfig(), context)
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(sizes.rows, sizes.dimension, generator=generator, requires_grad=True)
    teacher = torch.randn(sizes.rows, sizes.dimension, generator=generator)
    labels = torch.randint(sizes.classes, (sizes.rows,), generator=generator)

    def step() -> Tensor:
        of_ranks = group.sizes(sizes.rows)
        gathered = group.gather_with_gradient(for_ddp(student, ranks), of_ranks)
        batch = Batch(
            gathered, gathered, group.gather(labels, of_ranks), group.gather(teacher, of_ranks), of_ranks, step=0
        )
        (loss,) = head(batch).values()
        (gradient,) = torch.autograd.grad(loss, student)
        return gradient

    return step


def run(sizes: Sizes, device: torch.device) -> list[Row]:
    """Print the table of all heads and what our rank took here; return the rows. Runs on the CPU only.

    Computed quantities are those of a rank on a GPU: ``state_mb``, ``working_mb``, ``tflop``, ``sent_mb``.
    """
    cpu = torch.device("cpu")
    recorder = Recorder("scale", cpu)
    computed, measured = [], []
    largest_share = 0.0
    for ranks in sizes.ranks:
        whole = (sizes.classes, ranks, sizes.rows, sizes.dimension)
        shares = {
            "arcface_kd": arcface_kd_share(*whole, torch.device("cuda")),
            "partial_fc": partial_fc_share(*whole),
            "published_adadistill": published_share(*whole),
        }
        for provider, share in shares.items():
            batch = sizes.rows if provider == "published_adadistill" else ranks * sizes.rows
            where = f"{size(share.classes, batch, sizes.dimension)} N={ranks}"
            recorder.add(provider, where, "state_mb", share.state / 1e6)
            recorder.add(provider, where, "working_mb", share.working / 1e6)
            recorder.add(provider, where, "tflop", share.operations / 1e12)
            recorder.add(provider, where, "sent_mb", share.sent / 1e6)
            computed.append(
                [
                    f"{provider}, {ranks} ranks",
                    f"{share.classes:,}",
                    f"{batch:,}",
                    f"{share.state / 1e6:,.0f}",
                    f"{share.working / 1e6:,.0f}",
                    f"{share.operations / 1e12:.2f}",
                    f"{share.sent / 1e6:,.2f}",
                ]
            )
        ours = arcface_kd_share(*whole, cpu)
        where = f"{size(ours.classes, ranks * sizes.rows, sizes.dimension)} N={ranks}"
        step = share_step(sizes, ranks)
        seconds = interleaved_seconds({"arcface_kd": step}, sizes.rounds, cpu)["arcface_kd"]
        recorder.add("arcface_kd", where, "seconds", seconds)
        line = [f"arcface_kd, {ranks} ranks", f"{seconds:.2f}", f"{ours.operations / seconds / 1e9:.0f}"]
        if can_measure(cpu):
            del step
            peak = peak_mb(share_step, cpu, sizes, ranks)
            recorder.add("arcface_kd", where, "peak_mb", peak)
            line += [f"{ours.working / 1e6:.0f}", f"{peak:.0f}"]
            host = partial_fc_share(*whole)
            largest_share = max(largest_share, (ours.state + 1e6 * peak) / (host.state + host.working))
        measured.append(line)
    print_table(
        f"scale: {sizes.classes:,} classes, {sizes.rows} rows a rank, one rank's share of a step on GPUs, computed",
        ["head", "classes", "rows", "state MB", "working MB", "TFLOP", "sent MB"],
        computed,
    )
    print_table(
        "scale: our rank run on this CPU, collectives faked; the peak has libraries and the allocator's gaps in it",
        ["head", "seconds", "GFLOP/s", "working MB", "peak MB"][: len(measured[0])],
        measured,
    )
    if largest_share > 0:
        met = f"{largest_share:.3f} of it at most"
        print_verdict("state and measured peak a tenth of PartialFC's computed memory", met, largest_share <= 0.1)
    return recorder.rows
