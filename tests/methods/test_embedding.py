"""Embedding distillation: its distances and weights, with and without labels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.embedding import EmbeddingConfig, EmbeddingDistillation


def context() -> RunContext:
    return RunContext(9, 5, Margin(), RankGroup(alone=True), teacher_embedding_size=5)


def batch(rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(rows)
    student = torch.randn(rows, 5, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    return Batch(student, student, torch.tensor([0, 1, 1, -1, 4, 5])[:rows], teacher, [rows], 0)


def twin(given: Batch, distance: str, weight: float) -> Tensor:
    assert given.teacher is not None
    losses = []
    for s, t in zip(given.projected, given.teacher, strict=True):
        cosine = s @ t / (s.norm() * t.norm())
        losses.append((s / s.norm() - t / t.norm()).square().sum() if distance == "l2" else 1 - cosine)
    return weight * torch.stack(losses).mean()


@pytest.mark.parametrize("distance", ["l2", "cosine"])
@pytest.mark.parametrize("weight", [64.0, 0.5, 0.0])
def test_value_and_gradient_equal_the_twin_whether_a_row_has_a_label_or_not(distance: Any, weight: float) -> None:
    given = batch()
    wanted = twin(given, distance, weight)
    (gradient,) = torch.autograd.grad(wanted, given.projected)
    met = EmbeddingDistillation(EmbeddingConfig(distance, weight), context())(given)
    assert list(met) == ["embedding"]
    (met_gradient,) = torch.autograd.grad(met["embedding"], given.projected)
    torch.testing.assert_close(met["embedding"], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(met_gradient, gradient, rtol=1e-10, atol=1e-12)


def test_the_default_is_l2_with_the_logit_scale_as_weight() -> None:
    given = batch()
    met = EmbeddingDistillation(EmbeddingConfig(), context())(given)["embedding"]
    torch.testing.assert_close(met, twin(given, "l2", 64.0))
    half = EmbeddingDistillation(EmbeddingConfig("cosine", 128.0), context())(given)["embedding"]
    torch.testing.assert_close(half, met)


def test_it_observes_the_mean_cosine() -> None:
    method, given = EmbeddingDistillation(EmbeddingConfig(), context()), batch()
    assert method.observations() == {}
    method(given)
    assert given.teacher is not None
    wanted = torch.nn.functional.cosine_similarity(given.projected.detach(), given.teacher).mean()
    torch.testing.assert_close(method.observations()["embedding_cosine"], wanted)


def _head(methods: str, **options: object) -> DistillationHead:
    from arcface_kd.teachers.base import load_teacher
    from arcface_kd.teachers.options import TeacherOptions

    teacher = load_teacher(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5)), TeacherOptions(size=8))
    distiller = Distiller(KDConfig(tuple(methods.split("+")), options={"embedding": options}), teacher)
    return DistillationHead(distiller, Margin(), 5, 9, ranks=RankGroup(alone=True))


def test_without_labels_there_is_no_classifier() -> None:
    assert set(_head("embedding").methods) == {"classifier", "embedding"}
    assert set(_head("embedding", labels="none").methods) == {"embedding"}
    assert set(_head("rkd+embedding", labels="none").methods) == {"rkd", "embedding"}
    assert list(_head("embedding", labels="none").parameters()) == []


def test_without_labels_it_excludes_a_method_that_classifies() -> None:
    assert set(_head("adadistill+embedding").methods) == {"adadistill", "embedding"}
    with pytest.raises(ConfigError, match=r"adadistill .* embedding\.labels=classify") as error:
        _head("adadistill+embedding", labels="none")
    assert "\n" not in str(error.value)


def test_it_needs_a_teacher() -> None:
    with pytest.raises(TeacherError, match="embedding needs a teacher that embeds the training images"):
        Distiller(KDConfig(("embedding",)))
