"""KD, GKD and TH-KD over classes and batches that are split over ranks: the group is that of all classes together."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.logit_distillation import Grouping
from arcface_kd.methods.base import Batch, Method
from arcface_kd.methods.gkd import GKD, GKDConfig
from arcface_kd.methods.kd import LogitKD, LogitKDConfig
from arcface_kd.methods.thkd import THKD, THKDConfig
from tests.distributed.drawn_classes import drawn_classes
from tests.distributed.pool import RankPool
from tests.reference.logit_distillation import dense_distillation
from tests.reference.problems import COSFACE
from tests.reference.two_classifiers import TwoSides, two_sides

CLASSES = 43
SIZES = {
    1: [[9]],
    2: [[5, 4], [0, 7]],
    3: [[3, 3, 3], [6, 0, 2]],
    4: [[1, 5, 2, 1], [2, 2, 2, 2]],
}
GKD_CONFIGS = {
    "gkd, batch": GKDConfig(step=3, mass=0.8, ramp_epochs=0),
    "gkd, sample": GKDConfig(group="sample", mass=0.6, secondary_weight=0.5, ramp_epochs=0),
    "gkd, fixed": GKDConfig(group="fixed", size=7, ramp_epochs=0),
    "gkd, by teacher": GKDConfig(group="fixed", size=7, ranked_by="teacher", logits="plain", ramp_epochs=0),
    # More classes than any of two ranks has.
    "gkd, large": GKDConfig(group="fixed", size=30, ramp_epochs=0),
}
METHODS = ("kd", "thkd", *GKD_CONFIGS)


class Answer(NamedTuple):
    """One rank's step of one method."""

    terms: dict[str, Tensor]
    in_embeddings: Tensor
    in_classifier: Tensor
    seen: dict[str, Tensor]


def _method(name: str, given: TwoSides, ranks: RankGroup, sample_rate: float) -> Method:
    context = given.context(ranks, COSFACE, sample_rate=sample_rate)
    if name == "kd":
        return LogitKD(LogitKDConfig(), context)
    return THKD(THKDConfig(a=0.3), context) if name == "thkd" else GKD(GKD_CONFIGS[name], context)


def _problem(sizes: list[int]) -> TwoSides:
    return two_sides(sum(sizes), sum(sizes), CLASSES, dimension=6, teacher_dimension=6)


def _run(ranks: RankGroup, sizes: list[int], sample_rate: float) -> dict[str, Answer]:
    given = _problem(sizes)
    answers = {}
    for name in METHODS:
        method: Any = _method(name, given, ranks, sample_rate).double()
        own = ranks.own_rows(given.student, sizes).clone().requires_grad_()
        gathered = ranks.gather_with_gradient(own, sizes)
        terms = method(Batch(gathered, gathered, given.labels, given.teacher, sizes, 0))
        torch.stack(list(terms.values())).sum().backward()
        assert own.grad is not None
        answers[name] = Answer(
            {term: value.detach() for term, value in terms.items()},
            own.grad,
            method.classifier.weight.grad,
            method.observations(),
        )
    return answers


def _twin(name: str, sizes: list[int], sample_rate: float) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(terms, gradient in the embeddings, gradient in the classifier), dense and in one process."""
    given = _problem(sizes)
    student, weight = given.student.clone().requires_grad_(), given.weight.clone().requires_grad_()
    context = given.context(RankGroup(alone=True), COSFACE, sample_rate=sample_rate)
    index = drawn_classes(context, given.labels, len(sizes), 0)
    config = GKD_CONFIGS.get(name)

    def terms_of(centers: Tensor) -> tuple[Tensor, ...]:
        return dense_distillation(
            student,
            given.labels,
            centers,
            given.teacher,
            given.classifier,
            COSFACE,
            4.0,
            grouping=Grouping(config.rule(), config.ranked_by, config.secondary_weight > 0) if config else None,
            logits=config.logits if config else "plain",
            index=index,
        )

    ce, primary, binary, secondary = terms_of(weight)
    if name == "kd":
        terms = {"ce": ce, "kd": primary}
    elif config is None:
        head_ce, head_kd, _, _ = terms_of(given.classifier)
        terms = {
            "ce": 0.7 * ce,
            "ce_teacher_head": 0.3 * head_ce,
            "kd": 0.7 * primary,
            "kd_teacher_head": 0.3 * head_kd,
        }
    else:
        weights = config.weights(0)
        terms = {"ce": ce, "primary_kd": weights[0] * primary, "binary_kd": weights[1] * binary}
        if config.secondary_weight > 0:
            terms["secondary_kd"] = weights[2] * secondary
    torch.stack(list(terms.values())).sum().backward()
    assert student.grad is not None
    assert weight.grad is not None
    return {term: value.detach() for term, value in terms.items()}, student.grad, weight.grad


@pytest.mark.parametrize("sample_rate", [1.0, 0.6])
@pytest.mark.parametrize("world_size", SIZES)
def test_terms_and_gradients_are_those_of_one_process(ranks: RankPool, world_size: int, sample_rate: float) -> None:
    for sizes in SIZES[world_size]:
        answers = ranks.run(world_size, _run, sizes, sample_rate)
        for name in METHODS:
            met = [answer[name] for answer in answers]
            terms, in_embeddings, in_classifier = _twin(name, sizes, sample_rate)
            where = f"{name} on {sizes}: "
            for each in met:
                assert set(each.terms) == set(terms)
                for term, value in terms.items():
                    assert torch.equal(each.terms[term], met[0].terms[term]), where + f"ranks disagree about {term}"
                    assert torch.allclose(each.terms[term], value, rtol=1e-10, atol=1e-10), where + term
            for what, found, wanted in (
                ("embeddings", torch.cat([each.in_embeddings for each in met]), in_embeddings),
                ("classifier", torch.cat([each.in_classifier for each in met]), in_classifier),
            ):
                off = (found - wanted).abs().max() / wanted.abs().max()
                assert off < 1e-10, where + f"{what} off by {off:.1e}"


def test_the_group_is_counted_over_all_ranks(ranks: RankPool) -> None:
    sizes = [3, 3, 3]
    for answer in ranks.run(3, _run, sizes, 1.0):
        for name, size in (("gkd, fixed", 7), ("gkd, large", 30)):
            seen = answer[name].seen
            assert float(seen["group_size"]) == pytest.approx(min(size, CLASSES))
            assert 0 < seen["student_mass"] < 1
