"""RKD: its published weights on the terms that the losses' own tests hold against the twin."""

import pytest
import torch

from arcface_kd.config.options import build
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.rkd import RKD, RKDConfig
from tests.reference.compare import assert_same_terms
from tests.reference.rkd import rkd_angle, rkd_distance

CONTEXT = RunContext(9, 4, Margin(), RankGroup(alone=True), teacher_embedding_size=6)


@pytest.mark.parametrize(
    ("knobs", "terms"),
    [
        ({}, {"rkd_distance", "rkd_angle"}),
        ({"distance_weight": "0"}, {"rkd_angle"}),
        ({"angle_weight": "0"}, {"rkd_distance"}),
    ],
)
def test_terms_have_the_published_weights_and_need_no_labels(knobs: dict[str, object], terms: set[str]) -> None:
    """A weight of 0 takes a term out."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(5, size, generator=generator, dtype=torch.float64) for size in (4, 6))
    student.requires_grad_()
    met = RKD(build(RKDConfig, knobs, "rkd"), CONTEXT)(Batch(student, student, torch.full((5,), -1), teacher, [5], 0))
    wanted = {"rkd_distance": 25 * rkd_distance(student, teacher), "rkd_angle": 50 * rkd_angle(student, teacher)}
    assert_same_terms(met, {name: value for name, value in wanted.items() if name in terms}, student)
