"""``head.margin=adaface`` on several ranks: statistics of the gathered batch, losses and gradients against the twin."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.options import TeacherOptions
from tests.distributed.pool import RankPool
from tests.distributed.test_adadistill import CLASSES, Case, batches, networks
from tests.reference.adadistill import adadistill_step
from tests.reference.adaface import Statistics, adaface_softmax, lag
from tests.reference.problems import ARCFACE

STEPS, STEPS_PER_EPOCH = 3, 2
GEOMETRY = 3.0


class Step(NamedTuple):
    """What a rank has after a step."""

    loss: Tensor
    in_embeddings: Tensor
    in_classifier: Tensor  # empty for centers without a gradient
    mean: Tensor
    std: Tensor


class Answer(NamedTuple):
    """A rank's run: its class centers before each step, and the steps."""

    centers: list[Tensor]
    steps: list[Step]
    resumed: Step


def _head(method: str, ranks: RankGroup, case: Case) -> tuple[Distiller, DistillationHead, Any]:
    options: dict[str, dict[str, object]] = {"head": {"margin": "adaface"}}
    if method == "adadistill":
        options["adadistill"] = {"geometry": GEOMETRY}
    distiller = Distiller(
        KDConfig((method,) if method else (), options=options),
        load_teacher(networks(case)[0], TeacherOptions(size=8)) if method else None,
    )
    head = DistillationHead(distiller, ARCFACE, 6, CLASSES, seed=3, steps_per_epoch=STEPS_PER_EPOCH, ranks=ranks)
    head = head.double()
    owner: Any = head.methods["adadistill"].centers if method else head.methods["classifier"]
    if method:
        owner.refresh()
    return distiller, head, owner


def _norms(embeddings: Tensor) -> Tensor:
    """Rows of very different lengths, some beyond the clip."""
    return (
        embeddings
        * torch.tensor([0.5, 300.0, 20.0, 60.0, 5.0], dtype=embeddings.dtype).repeat(len(embeddings) // 5 + 1)[
            : len(embeddings), None
        ]
    )


def _run(ranks: RankGroup, case: Case, method: str) -> Answer:
    answer = Answer([], [], None)  # type: ignore[arg-type]
    distiller, head, owner = _head(method, ranks, case)
    student = networks(case)[1]

    def step(head: DistillationHead, owner: Any, distiller: Distiller, images: Tensor, labels: Tensor) -> Step:
        embeddings = _norms(student(images)).detach()
        own = ranks.own_rows(embeddings, case.sizes).clone().requires_grad_()
        if method:
            distiller.show(ranks.own_rows(images, case.sizes))
        loss = head(own, ranks.own_rows(labels, case.sizes))
        head.zero_grad()
        loss.backward()
        assert own.grad is not None
        quality: Any = head.quality
        return Step(
            loss.detach(),
            own.grad,
            torch.empty(0) if owner.weight.grad is None else owner.weight.grad.clone(),
            quality.mean.clone(),
            quality.std.clone(),
        )

    state: dict[str, Any] = {}
    for number, (images, labels) in enumerate(batches(case, STEPS)):
        if number == STEPS - 1:
            state = {name: value.clone() for name, value in head.state_dict().items()}
        answer.centers.append(owner.weight.detach().clone())
        answer.steps.append(step(head, owner, distiller, images, labels))
    distiller, head, owner = _head(method, ranks, case)
    head.load_state_dict(state)
    return answer._replace(resumed=step(head, owner, distiller, *batches(case, STEPS)[-1]))


@pytest.mark.parametrize("method", ["", "adadistill"], ids=["classifier", "adadistill"])
@pytest.mark.parametrize("sizes", [[8], [1], [7, 2], [0, 5], [1, 6, 2]], ids=str)
def test_three_steps_equal_the_twin_however_the_batch_is_split(ranks: RankPool, sizes: list[int], method: str) -> None:
    case = Case(sizes)
    answers = ranks.run(len(sizes), _run, case, method)
    statistics = Statistics()
    teacher, student = networks(case)
    for number, (images, labels) in enumerate(batches(case, STEPS)):
        embeddings = _norms(student(images)).detach().requires_grad_()
        qualities = statistics.qualities(embeddings, labels)
        centers = torch.cat([answer.centers[number] for answer in answers])
        if method:
            # Rank by rank and in fp32, as the teacher works.
            parts = [normalize(teacher(part.float())) for part in images.split(sizes)]
            told = torch.cat(parts).double().detach()
            weight = GEOMETRY * min(1.0, number / STEPS_PER_EPOCH)
            for row, label in enumerate(labels.tolist()):
                if label >= 0:
                    qualities[row] += weight * lag(embeddings[row].detach(), told[row], centers[label])
            centers = adadistill_step(embeddings, told, labels, centers, ARCFACE).centers
        centers = centers.clone().requires_grad_()
        loss = adaface_softmax(embeddings, labels, centers, qualities, 64.0)
        in_embeddings, in_centers = torch.autograd.grad(loss, [embeddings, centers])
        steps = [answer.steps[number] for answer in answers]
        for found in steps:
            torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-10, atol=1e-10)
            assert float(found.mean) == pytest.approx(statistics.mean, rel=1e-12)
            assert float(found.std) == pytest.approx(statistics.std, rel=1e-12)
            assert torch.equal(found.mean, steps[0].mean)
            assert torch.equal(found.std, steps[0].std)
        met = torch.cat([found.in_embeddings for found in steps])
        torch.testing.assert_close(met, in_embeddings * len(sizes), rtol=1e-10, atol=1e-10)
        if not method:
            met = torch.cat([found.in_classifier for found in steps])
            torch.testing.assert_close(met, in_centers, rtol=1e-10, atol=1e-8)
    for answer in answers:
        for resumed, wanted in zip(answer.resumed, answer.steps[-1], strict=True):
            assert torch.equal(resumed, wanted)
