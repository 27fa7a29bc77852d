"""AdaDistill in one process: equations, knobs, and the faults of the published code that must not come back.

Several ranks are in tests/distributed/test_adadistill.py.
"""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import TeacherError
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.adadistill import AdaDistill, AdaDistillConfig, adaptive_alpha
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.class_centers import DistilledCenters
from arcface_kd.teachers.base import load_teacher
from tests.reference.adadistill import adadistill_step
from tests.reference.problems import ARCFACE, COSFACE, MARGINS

CLASSES, DIMENSION = 9, 5


def make(config: AdaDistillConfig | None = None, margin: Margin = ARCFACE, **context: Any) -> AdaDistill:
    """The method in fp64, with centers of a later epoch."""
    ranks = RankGroup(alone=True)
    settings = {"num_classes": CLASSES, "embedding_size": DIMENSION, "teacher_embedding_size": DIMENSION, **context}
    method = AdaDistill(config or AdaDistillConfig(), RunContext(margin=margin, ranks=ranks, **settings)).double()
    generator = torch.Generator().manual_seed(1)
    method.centers.weight.copy_(torch.randn(CLASSES, DIMENSION, generator=generator, dtype=torch.float64))
    method.centers.refresh()
    return method


def batch(labels: list[int], seed: int = 0, step: int = 0) -> Batch:
    """Students, teachers and class centers of one row have much in common."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, DIMENSION, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = torch.tensor(labels)
    noise = torch.randn(2, len(labels), DIMENSION, generator=generator, dtype=torch.float64)
    teacher = normalize(centers[given.clamp_min(0)]) + 0.3 * noise[0]
    student = (2 * normalize(teacher) + 0.5 * noise[1]).requires_grad_()
    return Batch(student, student, given, 3 * teacher, [len(labels)], step)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("repeated", ["mean", "last"])
@pytest.mark.parametrize("alpha", ["weighted", "plain"])
def test_a_step_equals_the_twin(alpha: Any, repeated: Any, margin: str) -> None:
    method, given = make(AdaDistillConfig(alpha, repeated), MARGINS[margin]), batch([3, 0, 3, -1, 8, 3])
    assert given.teacher is not None
    student = given.embeddings.detach().clone().requires_grad_()
    wanted = adadistill_step(
        student,
        given.teacher,
        given.labels,
        method.centers.weight.clone(),
        MARGINS[margin],
        alpha=alpha,
        repeated=repeated,
    )
    wanted.loss.backward()
    (loss,) = method(given).values()
    loss.backward()
    torch.testing.assert_close(loss, wanted.loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(given.embeddings.grad, student.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(method.centers.weight, wanted.centers, rtol=1e-10, atol=1e-10)
    assert method._seen is not None
    alpha_met = torch.where(method._seen.valid, method._seen.alpha, torch.nan)
    torch.testing.assert_close(alpha_met, wanted.alpha, rtol=1e-10, atol=1e-10, equal_nan=True)
    valid = wanted.alpha[~wanted.alpha.isnan()]
    assert ((valid > 0.01) & (valid < 0.99)).all(), "the clips would hide the formula"


def test_alpha_is_clipped_as_published() -> None:
    cosine = torch.tensor([-1.0, -1e-3, 0.0, 0.5, 1.0, 1.0 + 1e-6], dtype=torch.float64)
    assert adaptive_alpha(cosine, None).tolist() == [0, 0, 0, 0.5, 1, 1]
    assert adaptive_alpha(cosine, torch.full_like(cosine, 0.5)).tolist() == [1e-6, 1e-6, 1e-6, 0.25, 0.5, 0.5]
    assert adaptive_alpha(cosine, torch.full_like(cosine, -0.5)).tolist() == [1e-6] * 6


def test_a_class_s_first_visit_puts_its_center_at_the_teacher() -> None:
    """Centers begin random, so cos(w, f_t) is about 0 and so is the weighted alpha."""
    head_context = RunContext(
        num_classes=50, embedding_size=512, margin=ARCFACE, ranks=RankGroup(alone=True), teacher_embedding_size=512
    )
    method = AdaDistill(AdaDistillConfig(), head_context)
    teacher = torch.randn(1, 512)
    student = teacher + 0.1 * torch.randn(1, 512)
    method(Batch(student, student, torch.tensor([7]), teacher, [1], 0))
    assert float(normalize(method.centers.weight[7:8]) @ normalize(teacher).T) > 0.99


def test_the_margin_is_the_trainers_own() -> None:
    losses = [make(margin=margin)(batch([1, 2]))["ce"].item() for margin in (ARCFACE, COSFACE)]
    assert losses[0] != losses[1]


def test_centers_are_kept_in_fp32_under_autocast() -> None:
    context = RunContext(
        num_classes=CLASSES,
        embedding_size=DIMENSION,
        margin=ARCFACE,
        ranks=RankGroup(alone=True),
        teacher_embedding_size=DIMENSION,
        product_dtype=torch.bfloat16,
    )
    plain, cast = AdaDistill(AdaDistillConfig(), context), AdaDistill(AdaDistillConfig(), context)
    given = batch([3, 0, 3])
    assert given.teacher is not None
    student = given.embeddings.detach().bfloat16()
    half = Batch(student, student, given.labels, given.teacher.float(), [3], 0)
    plain(half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast(half)
    assert cast.centers.weight.dtype == torch.float32
    assert torch.equal(plain.centers.weight, cast.centers.weight)


def test_sampling_keeps_every_class_of_the_batch_in() -> None:
    """The loss over a sample is that over fewer classes; the centers move all the same."""
    full, sampled = make(), make(sample_rate=0.4, seed=3)
    given = batch([3, 0, 3, 8])
    all_classes, few = full(given)["ce"].item(), sampled(given)["ce"].item()
    assert few < all_classes
    assert torch.equal(full.centers.weight, sampled.centers.weight)


def test_observations_are_those_of_rows_with_a_label() -> None:
    method = make()
    assert method.observations() == {}
    method(batch([3, 0, -1, 8]))
    assert method._seen is not None
    alpha = method._seen.alpha[torch.tensor([0, 1, 3])]
    met = method.observations()
    wanted = {"alpha_mean", "alpha_q10", "alpha_q50", "alpha_q90", "student_teacher_cosine", "center_drift"}
    assert set(met) == wanted
    torch.testing.assert_close(met["alpha_mean"], alpha.mean())
    torch.testing.assert_close(met["alpha_q50"], alpha.median())
    assert met["alpha_q10"] < met["alpha_q90"]
    assert all(not value.requires_grad for value in met.values())


@pytest.mark.parametrize("alpha", ["weighted", "plain"])
def test_the_drift_is_how_far_the_centers_of_a_batch_have_turned(alpha: Any) -> None:
    method, labels = make(AdaDistillConfig(alpha=alpha)), [3, 0, 3, -1, 8]
    before = method.centers.weight.clone()
    method(batch(labels))
    turned = [
        1 - torch.nn.functional.cosine_similarity(before[label], method.centers.weight[label], dim=0)
        for label in labels
        if label >= 0
    ]
    met = method.observations()["center_drift"]
    torch.testing.assert_close(met, torch.stack(turned).mean(), rtol=1e-10, atol=1e-12)
    assert 1e-4 < met < 1
    # A center that is where the teacher puts it does not turn any more, whatever its length does.
    given = batch([3])
    assert given.teacher is not None
    method.centers.weight[3] = 0.4 * normalize(given.teacher[0], dim=0)
    method.centers.refresh()
    method(given)
    assert method.observations()["center_drift"].abs() < 1e-12


def test_knobs_are_checked_without_a_config_file_too() -> None:
    with pytest.raises(ValueError, match="alpha is 'x'"):
        AdaDistillConfig(alpha="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="repeated is 'x'"):
        AdaDistillConfig(repeated="x")  # type: ignore[arg-type]


# ---- the nine faults of the published code (notes/methods.md, section 1)


def _first_pixels(images: Tensor) -> Tensor:
    """Stands for a teacher, which no test here asks: what it says of a batch is put in the place of its answer."""
    return images.flatten(1)[:, :DIMENSION]


def _head(**options: str) -> tuple[DistillationHead, Distiller]:
    distiller = Distiller(KDConfig(("adadistill",), options={"adadistill": options}), load_teacher(_first_pixels))
    return DistillationHead(distiller, ARCFACE, DIMENSION, CLASSES, ranks=RankGroup(alone=True)), distiller


def _step(head: DistillationHead, distiller: Distiller, labels: list[int], seed: int = 0) -> Tensor:
    given = batch(labels, seed)
    assert given.teacher is not None
    distiller._seen = given.teacher.float()
    loss: Tensor = head(given.embeddings.detach().float().requires_grad_(), given.labels)
    return loss


def test_fault_1_training_starts_with_the_arguments_that_the_trainer_has() -> None:
    """Published: the trainer passes a keyword that the head does not take. Here: (embeddings, labels), no more."""
    head, distiller = _head()
    _step(head, distiller, [1, 2, 3]).backward()


def test_fault_2_the_plain_alpha_runs() -> None:
    head, distiller = _head(alpha="plain")
    _step(head, distiller, [1, 2, 3]).backward()


def test_fault_3_a_label_twice_in_a_batch_keeps_both_updates() -> None:
    together, one, other = make(), make(), make()
    both = batch([4, 4])
    assert both.teacher is not None
    together(both)
    for method, row in ((one, 0), (other, 1)):
        student = both.embeddings.detach()[row : row + 1]
        method(Batch(student, student, both.labels[:1], both.teacher[row : row + 1], [1], 0))
    torch.testing.assert_close(together.centers.weight[4], (one.centers.weight[4] + other.centers.weight[4]) / 2)
    assert not torch.allclose(together.centers.weight[4], other.centers.weight[4])


def test_fault_4_ranks_cannot_diverge_since_each_class_has_one_owner() -> None:
    """Two ranks' shards, fed the gathered batch, hold together what one process holds."""
    whole, given = make(), batch([0, 8, 4, 4])
    assert given.teacher is not None
    teacher, alpha = normalize(given.teacher), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    shards = []
    for rank in range(2):
        shard = ClassShard(CLASSES, rank, 2)
        part = DistilledCenters(shard, DIMENSION).double()
        part.load_state_dict({"weight": whole.centers.weight[shard.start : shard.start + shard.size]})
        shards.append(part)
    for centers in (whole.centers, *shards):
        centers.update(given.labels, teacher, alpha)
    assert torch.equal(torch.cat([part.weight for part in shards]), whole.centers.weight)


def test_a_batch_that_nobody_observes_leaves_no_observations() -> None:
    method, given = make(), batch([2, 5])
    method(given)
    assert method.observations()
    method(replace(given, observed=False))
    assert method.observations() == {}


def test_fault_5_no_gradient_is_computed_for_the_centers() -> None:
    head, distiller = _head()
    assert list(head.parameters()) == []
    loss = _step(head, distiller, [1, 2, 3])
    kept: list[tuple[int, ...]] = []
    node: Any = loss.grad_fn
    while node is not None:
        kept += [tuple(t.shape) for t in getattr(node, "saved_tensors", ()) if isinstance(t, Tensor)]
        node = node.next_functions[0][0] if node.next_functions else None
    assert (3, DIMENSION) in kept, "the walk through the graph has lost its way"
    assert (CLASSES, DIMENSION) not in kept


def test_fault_6_gradients_are_finite_at_cosine_1_and_the_margin_never_turns_back() -> None:
    method = make()
    given = batch([2, 5])
    assert given.teacher is not None
    # Student equals teacher, and the center is there already: alpha 1, cosine 1.
    teacher = normalize(method.centers.weight[[2, 5]])
    for sign in (1.0, -1.0):
        student = (sign * teacher).clone().requires_grad_()
        loss = method(Batch(student, student, given.labels, teacher, [2], 0))["ce"]
        loss.backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        assert loss.isfinite()
    psi, _ = ARCFACE.target(torch.tensor([-0.99, -1.0], dtype=torch.float64))
    assert psi[0] > psi[1]


def test_fault_7_nothing_of_the_head_writes_files_of_its_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state goes through ``state_dict`` into the trainer's file of the rank."""
    monkeypatch.chdir(tmp_path)
    head, distiller = _head()
    _step(head, distiller, [1, 2, 3])
    head.state_dict()
    assert list(tmp_path.iterdir()) == []


def test_fault_8_resume_brings_the_centers_back() -> None:
    head, distiller = _head()
    for seed in range(3):
        _step(head, distiller, [1, 2, 3], seed)
    resumed, again = _head()
    resumed.load_state_dict(head.state_dict())
    for seed in (3, 4):
        assert torch.equal(_step(head, distiller, [1, 3, 8], seed), _step(resumed, again, [1, 3, 8], seed))
    fresh, new = _head()
    assert not torch.equal(_step(fresh, new, [1, 3, 8], 3), _step(head, distiller, [1, 3, 8], 3))


def test_fault_9_a_missing_teacher_stops_the_run(tmp_path: Any) -> None:
    with pytest.raises(TeacherError, match=r"adadistill needs a teacher .* --kd-teacher FILE"):
        Distiller(KDConfig(("adadistill",)))
    missing = tmp_path / "no_such_teacher.pt"
    with pytest.raises(TeacherError, match=re.escape(str(missing))):
        Distiller(KDConfig(("adadistill",), str(missing)))
