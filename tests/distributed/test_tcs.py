"""TCS on several ranks: they share the reading of the cache, the classes and the importance, and drop the same axes."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import TeacherError
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.class_centers import initial_centers
from arcface_kd.methods.tcs.method import TCS, TCSConfig
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache
from arcface_kd.teachers.cache.principal_components import components_file, components_of_cache
from tests.distributed.pool import RankError, RankPool
from tests.methods.tcs.test_method import DIMENSION, TEACHER_DIMENSION, small_student
from tests.reference.problems import ARCFACE, random_problem
from tests.reference.tcs import classification, mimic_distance, step_importance
from tests.teachers.cache.test_principal_components import assert_is_sklearns, filled_cache, identity

CLASSES, IMAGES = 11, 41
CONFIG = TCSConfig(dimension=6, mimic=3.0, drop=0.5, rounds=3, drop_begin=0.1, drop_end=0.7)


class Answer(NamedTuple):
    """One rank's step, and what stood after the next one."""

    ce: Tensor
    mimic: Tensor
    in_embeddings: Tensor
    in_classes: Tensor
    importance: Tensor
    mask: Tensor
    system: tuple[Tensor, Tensor]


def _teacher(rows: int) -> Tensor:
    drawn = torch.randn(rows, TEACHER_DIMENSION, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    return normalize(drawn)


def _step(ranks: RankGroup, sizes: list[int], file: Path) -> Answer:
    cache = EmbeddingCache(file, identity(IMAGES, TEACHER_DIMENSION), create=False)
    student = small_student()
    TCS.prepare_student(CONFIG, student)
    context = RunContext(
        num_classes=CLASSES,
        embedding_size=DIMENSION,
        margin=ARCFACE,
        ranks=ranks,
        total_steps=100,
        cache=cache,
        student=student,
    )
    method = TCS(CONFIG, context).double()
    problem = random_problem(sum(sizes), sum(sizes), CLASSES, DIMENSION)
    own = ranks.own_rows(problem.embeddings, sizes).clone()
    own[:, 6:] = 0
    own.requires_grad_()

    def terms(step: int) -> dict[str, Tensor]:
        embeddings = ranks.gather_with_gradient(own, sizes)
        return method(Batch(embeddings, embeddings, problem.labels, _teacher(sum(sizes)), sizes, step))

    first = terms(15)
    (first["ce"] + first["mimic"]).backward()
    assert own.grad is not None
    assert method.classifier.weight.grad is not None
    importance = method.importance.clone()
    terms(30)
    return Answer(
        first["ce"].detach(),
        first["mimic"].detach(),
        own.grad,
        method.classifier.weight.grad,
        importance,
        method.mask,
        (method.mean, method.axes),
    )


@pytest.mark.parametrize("sizes", [[9], [5, 4], [0, 7], [2, 6, 1]], ids=str)
def test_a_step_equals_the_twin_however_classes_and_batch_are_split(
    ranks: RankPool, sizes: list[int], tmp_path: Path
) -> None:
    cache, rows = filled_cache(tmp_path / "rows", IMAGES, TEACHER_DIMENSION)
    answers = ranks.run(len(sizes), _step, sizes, tmp_path / "rows")
    # The ranks have found and kept the components together.
    assert components_file(cache).exists()
    assert_is_sklearns(components_of_cache(cache, RankGroup(alone=True)), rows)
    mean, axes = answers[0].system
    mask = torch.tensor([1.0] * 6 + [0.0] * 4, dtype=torch.float64)
    problem = random_problem(sum(sizes), sum(sizes), CLASSES, DIMENSION)
    student = (problem.embeddings * mask).requires_grad_()
    classifier = (initial_centers(ClassShard(CLASSES), DIMENSION, 0).double() * mask).requires_grad_()
    ce = classification(student, problem.labels, classifier, ARCFACE, mask)
    mimic = 3.0 * mimic_distance(student, _teacher(sum(sizes)), mean, axes, mask)
    (ce + mimic).backward()
    assert student.grad is not None
    assert classifier.grad is not None
    importance = step_importance(student, problem.labels, classifier.detach(), ARCFACE, mask)
    for answer in answers:
        torch.testing.assert_close(answer.ce, ce.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(answer.mimic, mimic.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(answer.importance, importance, rtol=1e-8, atol=1e-12)
        assert torch.equal(answer.importance, answers[0].importance)
        assert [torch.equal(*pair) for pair in zip(answer.system, answers[0].system, strict=True)] == [True, True]
        gone = (answer.mask == 0).nonzero().flatten().tolist()
        assert gone == sorted([int(importance[:6].argmin()), 6, 7, 8, 9])
    met = torch.cat([answer.in_embeddings for answer in answers])
    torch.testing.assert_close(met, student.grad * mask, rtol=1e-8, atol=1e-10)
    met = torch.cat([answer.in_classes for answer in answers])
    torch.testing.assert_close(met, classifier.grad, rtol=1e-8, atol=1e-10)


def test_holes_of_all_ranks_parts_are_counted(ranks: RankPool, tmp_path: Path) -> None:
    filled_cache(tmp_path / "rows", IMAGES, TEACHER_DIMENSION)
    with (tmp_path / "rows").open("r+b") as stream:
        for row in (1, 2 * IMAGES - 1):
            stream.seek(row * 2 * TEACHER_DIMENSION)
            stream.write(b"\0" * 2 * TEACHER_DIMENSION)
    with pytest.raises(RankError, match=f"{TeacherError.__name__}: the cache .* lacks 2 of {2 * IMAGES} embeddings"):
        ranks.run(2, _step, [5, 4], tmp_path / "rows")
