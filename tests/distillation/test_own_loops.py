"""Loops of users' own: cells run again, other calls of the student, checkpointing, frozen batch norms, whole heads."""

import copy
import io
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.errors import CheckpointError, ConfigError
from arcface_kd.losses.margin import Margin
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.options import TeacherOptions

CLASSES, DIMENSION = 7, 6
LABELS = torch.tensor([0, 3, 3, 6])


class Student(nn.Module):
    """Two blocks and a layer, whose blocks may be recomputed in the backward pass."""

    def __init__(self, seed: int = 0, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8)) for width in (3, 8)
        )
        self.layer = nn.Linear(8, DIMENSION)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.layer(x.mean((2, 3)))


class CountingTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network, self.passes = Student(seed=1), 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        return self.network(images)


class Run:
    """A watched student, its head and the passes of the teacher since."""

    def __init__(self, student: nn.Module, kd: str = "embedding") -> None:
        self.network = CountingTeacher()
        teacher: Teacher = load_teacher(self.network, TeacherOptions(size=8))
        maps = {"crosskd": {"student_map": "blocks.1", "teacher_map": "network.blocks.1"}} if "crosskd" in kd else {}
        self.distiller = Distiller(KDConfig(tuple(kd.split("+")), options=maps), teacher)
        self.student = self.distiller.watch(student)
        self.head = DistillationHead(self.distiller, Margin(m2=0.5), DIMENSION, CLASSES)
        self.network.passes = 0


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kd", ["embedding", "crosskd"])
def test_a_student_that_is_watched_again_is_watched_once(kd: str) -> None:
    student, once = Student(), Run(Student(), kd)
    first, second = Run(student, kd), Run(student, kd)
    second.distiller.watch(student)
    first.network.passes = second.network.passes = 0
    losses = [run.head(run.student(images()), LABELS) for run in (once, second)]
    assert torch.equal(*losses)
    assert first.network.passes == 0
    assert second.network.passes == once.network.passes > 0


def test_a_copy_that_is_watched_itself_shows_nothing_to_the_first_teacher() -> None:
    first = Run(Student())
    second = Run(copy.deepcopy(first.student))
    first.network.passes = second.network.passes = 0
    second.head(second.student(images()), LABELS)
    assert (first.network.passes, second.network.passes) == (0, 1)


def test_two_students_are_watched_side_by_side() -> None:
    first, second = Run(Student(0)), Run(Student(1))
    for run in (first, second):
        run.head(run.student(images()), LABELS)
        assert run.network.passes == 1


def test_the_student_takes_its_images_by_keyword() -> None:
    run = Run(Student())
    met = run.head(run.student(x=images()), LABELS)
    torch.testing.assert_close(met, run.head(run.student(images()), LABELS), rtol=0, atol=0)


@pytest.mark.parametrize(("scale", "told"), [(1.0, False), (127.5, True), (2.2, True)])
def test_images_out_of_range_are_told_once(scale: float, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(Student())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            run.head(run.student(images() * scale), LABELS)
    assert [record.name for record in caplog.records] == ["arcface_kd.distillation.distiller"] * told


def test_several_outputs_of_a_student_are_told() -> None:
    run = Run(Student())
    with pytest.raises(ConfigError, match="tuple"):
        run.head((run.student(images()), images()), LABELS)


@pytest.mark.parametrize("save", [lambda head: torch.save(head, io.BytesIO()), copy.copy])
def test_a_head_is_not_saved_whole(save: object) -> None:
    with pytest.raises(CheckpointError, match="state_dict"):
        save(Run(Student()).head)  # type: ignore[operator]


def test_a_copied_head_trains_on() -> None:
    run = Run(Student())
    embeddings = run.student(images()).detach()
    run.student(images())
    twin = copy.deepcopy(run.head)
    assert torch.equal(twin(embeddings, LABELS), run.head(embeddings, LABELS))


def gradients(run: Run, *, whole: bool = False) -> list[Tensor]:
    """The student's, after two steps."""
    optimizer = torch.optim.SGD([*run.student.parameters(), *run.head.parameters()], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        embeddings = checkpoint(run.student, images(), use_reentrant=False) if whole else run.student(images())
        run.head(embeddings, LABELS).backward()
        optimizer.step()
    return [parameter.grad for parameter in run.student.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kd", ["embedding", "crosskd+adadistill"])
@pytest.mark.parametrize("whole", [False, True])
def test_activation_checkpointing_changes_nothing(kd: str, whole: bool) -> None:
    plain = gradients(Run(Student(), kd))
    met = gradients(Run(Student(recompute=not whole), kd), whole=whole)
    assert all(torch.equal(one, other) for one, other in zip(met, plain, strict=True))


def test_frozen_batch_norms_stay_frozen() -> None:
    run = Run(Student())
    norms = [module for module in run.student.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.eval().requires_grad_(False)
    before = [(norm.running_mean.clone(), norm.weight.clone()) for norm in norms if norm.running_mean is not None]
    found = gradients(run)
    assert len(found) == len(list(run.student.parameters())) - 2 * len(norms)
    for norm, (mean, weight) in zip(norms, before, strict=True):
        assert norm.running_mean is not None
        assert torch.equal(norm.running_mean, mean)
        assert torch.equal(norm.weight, weight)
