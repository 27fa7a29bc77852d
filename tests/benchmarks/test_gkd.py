"""Grouped KD's benchmark: the dense reference computes what it stands for, and the rows that come out."""

import pytest
import torch

from arcface_kd.losses.class_groups import BatchMass, FixedSize
from arcface_kd.losses.logit_distillation import Grouping
from benchmarks import gkd
from benchmarks.dense_heads import DenseGKD
from tests.reference.logit_distillation import dense_distillation
from tests.reference.two_classifiers import two_sides

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [40, None], ids=["fixed", "batch"])
def test_the_dense_reference_equals_the_twin(size: int | None) -> None:
    given = two_sides(1, batch=9, classes=450, dimension=12)
    labels = torch.arange(9) * 7
    head = DenseGKD(given.weight, given.classifier, 64.0, 0.4, 4.0, size, 0.8, 4.0)
    student = given.student.clone().requires_grad_()
    loss = head(student, given.teacher, labels)
    loss.backward()
    rule = BatchMass(0.8) if size is None else FixedSize(size)
    twin_student, weight = given.student.clone().requires_grad_(), given.weight.clone().requires_grad_()
    ce, primary, binary, _ = dense_distillation(
        twin_student,
        labels,
        weight,
        given.teacher,
        given.classifier,
        gkd.MARGIN,
        4.0,
        grouping=Grouping(rule),
        logits="margin",
    )
    wanted = ce + 4.0 * primary + binary
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(student.grad, twin_student.grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(head.weight.grad, weight.grad, rtol=1e-8, atol=1e-8)


def test_a_run_has_a_row_for_each_provider_and_says_whether_the_claims_held(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gkd, "can_measure", lambda device: False)
    rows = gkd.run(gkd.TINY, CPU)
    ours = {f"arcface_kd, {group}" for group in ("batch", "sample", "fixed")}
    assert {row.provider for row in rows} == {"floor", "dense_reference, batch", "dense_reference, fixed"} | ours
    assert {row.metric for row in rows} == {"seconds"}
    assert all(row.value > 0 for row in rows)
    printed = capsys.readouterr().out
    for group in ("batch", "sample", "fixed"):
        assert f"{group}: at most 2.5 times the products" in printed
    for group in ("batch", "fixed"):
        assert f"{group}: a quarter of the dense reference" in printed


def test_heads_that_compute_something_else_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gkd, "dense_step", lambda sizes, device, group: lambda: 1.0)
    with pytest.raises(RuntimeError, match="do not compute the same: with group=batch"):
        gkd.run(gkd.TINY, CPU)
