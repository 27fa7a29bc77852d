"""RKD: its published weights on the terms that the losses' own tests hold against the twin."""

import pytest
import torch

from arcface_kd.config.options import build
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.rkd import RKD, RKDConfig
from tests.reference.rkd import rkd_angle, rkd_distance

CONTEXT = RunContext(9, 4, Margin(), RankGroup(alone=True), teacher_embedding_size=6)


def batch(rows: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(rows)
    student = torch.randn(rows, 4, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return Batch(student, student, torch.full((rows,), -1), teacher, [rows], 0)


def test_the_terms_have_the_published_weights_and_need_no_labels() -> None:
    given = batch()
    assert given.teacher is not None
    terms = RKD(RKDConfig(), CONTEXT)(given)
    wanted = {
        "rkd_distance": 25 * rkd_distance(given.embeddings, given.teacher),
        "rkd_angle": 50 * rkd_angle(given.embeddings, given.teacher),
    }
    assert terms.keys() == wanted.keys()
    for name in terms:
        torch.testing.assert_close(terms[name], wanted[name], rtol=1e-10, atol=1e-10)
        gradients = [torch.autograd.grad(loss[name], given.embeddings)[0] for loss in (terms, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("knob", "left"), [("distance_weight", "rkd_angle"), ("angle_weight", "rkd_distance")])
def test_a_weight_of_0_takes_a_term_out(knob: str, left: str) -> None:
    assert list(RKD(build(RKDConfig, {knob: "0"}, "rkd"), CONTEXT)(batch())) == [left]


def test_one_row_has_no_relations() -> None:
    given = batch(1)
    torch.stack(list(RKD(RKDConfig(), CONTEXT)(given).values())).sum().backward()
    assert given.embeddings.grad is not None
    assert (given.embeddings.grad == 0).all()
