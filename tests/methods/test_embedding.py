"""Embedding distillation: its distances and weights, with and without labels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.embedding import EmbeddingConfig, EmbeddingDistillation
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.options import TeacherOptions
from tests.reference.compare import assert_same_terms

CONTEXT = RunContext(9, 5, Margin(), RankGroup(alone=True), teacher_embedding_size=5)


def batch() -> tuple[Batch, Tensor]:
    """The batch, in which a row has no label, and its teacher's embeddings."""
    generator = torch.Generator().manual_seed(6)
    student, teacher = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    return Batch(student, student, torch.tensor([0, 1, 1, -1, 4, 5]), teacher, [6], 0), teacher


def twin(student: Tensor, teacher: Tensor, distance: str, weight: float) -> Tensor:
    losses = []
    for s, t in zip(student, teacher, strict=True):
        cosine = s @ t / (s.norm() * t.norm())
        losses.append((s / s.norm() - t / t.norm()).square().sum() if distance == "l2" else 1 - cosine)
    return weight * torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("knobs", "distance", "weight"),
    [
        ((), "l2", 64.0),
        (("l2", 0.5), "l2", 0.5),
        (("l2", 0.0), "l2", 0.0),
        (("cosine", 64.0), "cosine", 64.0),
        (("cosine", 128.0), "l2", 64.0),
    ],
)
def test_value_and_gradient_equal_the_twin(knobs: Any, distance: str, weight: float) -> None:
    """By default, L2 with the logit scale as the weight."""
    given, teacher = batch()
    wanted = {"embedding": twin(given.projected, teacher, distance, weight)}
    assert_same_terms(EmbeddingDistillation(EmbeddingConfig(*knobs), CONTEXT)(given), wanted, given.projected)


def test_it_observes_the_mean_cosine() -> None:
    method, (given, teacher) = EmbeddingDistillation(EmbeddingConfig(), CONTEXT), batch()
    assert method.observations() == {}
    method(given)
    wanted = torch.nn.functional.cosine_similarity(given.projected.detach(), teacher).mean()
    torch.testing.assert_close(method.observations()["embedding_cosine"], wanted)


@pytest.mark.parametrize(
    ("kd", "labels", "methods"),
    [
        ("embedding", "classify", {"classifier", "embedding"}),
        ("embedding", "none", {"embedding"}),
        ("rkd+embedding", "none", {"rkd", "embedding"}),
        ("adadistill+embedding", "classify", {"adadistill", "embedding"}),
    ],
)
def test_without_labels_there_is_no_classifier(kd: str, labels: str, methods: set[str]) -> None:
    teacher = load_teacher(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5)), TeacherOptions(size=8))
    distiller = Distiller(KDConfig(tuple(kd.split("+")), options={"embedding": {"labels": labels}}), teacher)
    head = DistillationHead(distiller, Margin(), 5, 9, ranks=RankGroup(alone=True))
    assert set(head.methods) == methods
    assert (list(head.parameters()) == []) == ("classifier" not in methods)
