"""The references compute what they stand for; otherwise a comparison with them means nothing."""

import torch

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.adadistill import AdaDistill, AdaDistillConfig
from arcface_kd.methods.base import Batch, RunContext
from benchmarks.dense_heads import DenseAdaDistill, DenseClassifier
from tests.reference.adadistill import adadistill_step
from tests.reference.margin_softmax import dense_margin_softmax
from tests.reference.problems import Problem, random_problem

MARGIN = Margin(64.0, 1.0, 0.45, 0.0)


def _tame(problem: Problem) -> Problem:
    """No row against its center, where the published head has no straight continuation; no label twice, none absent."""
    batch = problem.labels.shape[0]
    labels = torch.arange(batch) * 2
    embeddings = torch.nn.functional.normalize(problem.embeddings) + torch.nn.functional.normalize(
        problem.centers[labels]
    )
    return Problem(embeddings, labels, problem.centers)


def test_dense_adadistill_equals_the_twin_and_our_method() -> None:
    problem = _tame(random_problem(1, batch=9, classes=30, dimension=12, dtype=torch.float32))
    teacher = torch.nn.functional.normalize(problem.embeddings + 0.3)
    head = DenseAdaDistill(30, 12, MARGIN.scale, MARGIN.m2)
    head.centers.data.copy_(problem.centers.T)
    student = problem.embeddings.clone().requires_grad_()
    loss = head(student, teacher, problem.labels)
    loss.backward()

    wanted = adadistill_step(problem.embeddings, teacher, problem.labels, problem.centers, MARGIN)
    torch.testing.assert_close(loss, wanted.loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.centers.detach().T, wanted.centers, rtol=1e-5, atol=1e-6)

    context = RunContext(30, 12, MARGIN, RankGroup(alone=True), teacher_embedding_size=12)
    ours = AdaDistill(AdaDistillConfig(), context)
    ours.centers.weight.copy_(problem.centers)
    ours.centers.refresh()
    own = problem.embeddings.clone().requires_grad_()
    term = ours(Batch(own, own, problem.labels, teacher, [9], 0))["ce"]
    term.backward()
    torch.testing.assert_close(term, loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.grad, student.grad, rtol=1e-3, atol=1e-4)


def test_dense_adadistill_keeps_the_gradient_that_nobody_uses() -> None:
    problem = _tame(random_problem(2, batch=5, classes=12, dimension=6, dtype=torch.float32))
    head = DenseAdaDistill(12, 6, MARGIN.scale, MARGIN.m2)
    # A teacher unlike any student's row: where the two agree, the published acos has an infinite gradient.
    teacher = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    norms = []
    for _ in range(2):
        head(problem.embeddings.clone().requires_grad_(), teacher, problem.labels).backward()
        assert head.centers.grad is not None
        assert head.centers.grad.shape == (6, 12)
        norms.append(head.centers.grad.norm().item())
    assert norms[0] > 0
    assert norms[1] != norms[0]


def test_dense_classifier_equals_the_twin() -> None:
    problem = _tame(random_problem(3, batch=9, classes=30, dimension=12, dtype=torch.float32))
    head = DenseClassifier(problem.centers, MARGIN.scale, MARGIN.m2)
    embeddings = problem.embeddings.clone().requires_grad_()
    head(embeddings, problem.labels).backward()
    twin, centers = problem.embeddings.clone().requires_grad_(), problem.centers.clone().requires_grad_()
    dense_margin_softmax(twin, problem.labels, centers, MARGIN).backward()
    torch.testing.assert_close(embeddings.grad, twin.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head.weight.grad, centers.grad, rtol=1e-3, atol=1e-5)
