"""What a teacher is, and whether its input is prepared as it was trained with."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from arcface_kd.data.formats.verification_bin import VerificationSet, read_bin
from arcface_kd.errors import DataError
from arcface_kd.evaluation.teacher_check import TeacherReport, Trial, _subset, _surely_better, check_teacher
from arcface_kd.teachers import Preprocessing, Teacher, load_teacher


def blue_faces(pairs: int = 60, seed: int = 0) -> VerificationSet:
    """Pairs of which only the blue channel tells who is who; the red one is noise as strong."""
    generator = np.random.default_rng(seed)
    images, is_same = [], []
    for number in range(pairs):
        same = number % 2 == 0
        first = generator.integers(0, 256, (8, 8))
        second = first if same else generator.integers(0, 256, (8, 8))
        for blue in (first, second):
            planes = [
                blue + generator.integers(-20, 21, (8, 8)),
                np.full((8, 8), 128),
                generator.integers(0, 256, (8, 8)),
            ]
            small = np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)
            image = cv2.resize(small, (112, 112), interpolation=cv2.INTER_NEAREST)
            images.append(cv2.imencode(".png", image)[1].tobytes())
        is_same.append(same)
    return VerificationSet("blue", images, np.array(is_same))


def first_channel(images: Tensor) -> Tensor:
    """Embeds the first channel, and saturates at pixel values that were not scaled."""
    return torch.tanh(2 * torch.nn.functional.adaptive_avg_pool2d(images[:, :1], 8).flatten(1))


def teacher_of(preprocessing: Preprocessing) -> Teacher:
    return Teacher(first_channel, preprocessing=preprocessing, description="first channel", weights="w")


BLUE_FIRST = Preprocessing("bgr", (127.5,) * 3, (127.5,) * 3)
RED_FIRST = Preprocessing("rgb", (127.5,) * 3, (127.5,) * 3)


def judged(report: TeacherReport) -> tuple[Trial, Trial]:
    """The best preprocessing and the one in use."""
    assert report.best is not None
    assert report.in_use is not None
    return report.best, report.in_use


def accuracy(trial: Trial) -> float:
    assert trial.accuracy is not None
    return trial.accuracy


def test_without_pairs_the_teacher_is_described() -> None:
    layers = torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 5)
    teacher = load_teacher(torch.nn.Sequential(*layers))
    report = check_teacher(teacher)
    assert report.best is None
    assert report.warning is None
    for word in ("5 dimensions", "parameters   65", "rgb, (x - 127.5) / 127.5, 112x112", teacher.fingerprint):
        assert word in str(report)
    assert "accuracy" not in str(report)
    assert "parameters   unknown" in str(check_teacher(teacher_of(BLUE_FIRST)))


def test_a_wrong_channel_order_is_found_named_and_warned_of() -> None:
    report = check_teacher(teacher_of(RED_FIRST), blue_faces())
    best, used = judged(report)
    assert best.preprocessing.channels == "bgr"
    assert used.preprocessing == RED_FIRST
    assert accuracy(used) < 0.8 < 0.95 < accuracy(best)
    assert f"give --kd-option {best.preprocessing.as_options()}" in str(report.warning)
    assert f"best    {100 * accuracy(best):6.2f} %  bgr" in str(report)
    assert f"WARNING: {report.warning}" in str(report)


def test_the_right_preprocessing_raises_no_warning() -> None:
    report = check_teacher(teacher_of(BLUE_FIRST), blue_faces())
    _, used = judged(report)
    assert used.preprocessing == BLUE_FIRST
    assert accuracy(used) > 0.95
    assert report.warning is None
    assert "WARNING" not in str(report)


def test_all_usual_preprocessings_and_the_one_in_use_are_tried_once() -> None:
    odd = Preprocessing("bgr", (120.0,) * 3, (130.0,) * 3)
    report = check_teacher(teacher_of(odd), blue_faces())
    tried = [trial.preprocessing for trial in report.trials]
    assert len(tried) == len(set(tried)) == 13
    assert odd in tried
    assert Preprocessing("rgb", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)) in tried
    assert Preprocessing("bgr", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)) in tried
    separations = [trial.separation for trial in report.trials]
    assert separations == sorted(separations, reverse=True)
    assert len(check_teacher(teacher_of(BLUE_FIRST), blue_faces()).trials) == 12


def test_a_preprocessing_that_overflows_comes_last() -> None:
    def delicate(images: Tensor) -> Tensor:
        return first_channel(images) / (images.abs().amax() < 10)

    teacher = Teacher(delicate, preprocessing=BLUE_FIRST, description="delicate", weights="w")
    report = check_teacher(teacher, blue_faces())
    assert [trial.separation for trial in report.trials[-2:]] == [-np.inf, -np.inf]
    assert {trial.preprocessing.std for trial in report.trials[-2:]} == {(1.0, 1.0, 1.0)}
    assert report.warning is None


def test_a_large_set_is_looked_at_in_part_and_evenly() -> None:
    is_same = np.array([number % 3 == 0 for number in range(3000)])
    whole = VerificationSet("large", [b"%d" % number for number in range(6000)], is_same)
    part = _subset(whole, 100)
    assert len(part.is_same) == 100
    assert part.is_same.sum() == 50
    numbers = [int(image) for image in part.images]
    assert numbers == sorted(numbers)
    assert all(
        first % 2 == 0 and second == first + 1 for first, second in zip(numbers[::2], numbers[1::2], strict=True)
    )
    assert all(is_same[first // 2] == same for first, same in zip(numbers[::2], part.is_same, strict=True))
    assert numbers[-1] > 5900
    assert len(_subset(whole, 10_000).is_same) == 3000
    report = check_teacher(teacher_of(BLUE_FIRST), blue_faces(60), pairs=20)
    assert report.pairs == report.screened == 20


def test_pairs_are_counted_and_a_small_set_is_named() -> None:
    small = check_teacher(teacher_of(BLUE_FIRST), blue_faces(60))
    assert (small.screened, small.pairs) == (60, 60)
    assert "preprocessing (60 pairs)" in str(small)
    assert "NOTE: 60 pairs are too few" in str(small)
    large = check_teacher(teacher_of(BLUE_FIRST), blue_faces(120))
    assert (large.screened, large.pairs) == (100, 120)
    assert check_teacher(teacher_of(judged(large)[0].preprocessing), blue_faces(120)).doubt is None
    # Certain all the same.
    assert check_teacher(teacher_of(RED_FIRST), blue_faces(60)).doubt is None


def test_a_difference_within_the_noise_is_no_difference() -> None:
    generator = np.random.default_rng(0)
    is_same = np.arange(200) % 2 == 0
    used = np.where(is_same, 0.6, 0.0) + generator.normal(0, 0.2, 200)
    assert not _surely_better(used, used, is_same)
    assert not _surely_better(used + generator.normal(0, 0.001, 200), used, is_same)
    assert not _surely_better(np.where(is_same, 0.6, 0.0) + generator.normal(0, 0.195, 200), used, is_same)
    assert _surely_better(np.where(is_same, 0.6, 0.0) + generator.normal(0, 0.1, 200), used, is_same)


def test_too_few_pairs_are_refused() -> None:
    faces = blue_faces(20)
    one_kind = VerificationSet("same", faces.images, np.ones(20, dtype=bool))
    with pytest.raises(DataError, match="same: 20 same and 0 different pairs; wanted 5 or more of each"):
        check_teacher(teacher_of(BLUE_FIRST), one_kind)
    with pytest.raises(DataError, match="10 pairs cannot tell"):
        check_teacher(teacher_of(BLUE_FIRST), faces, pairs=10)


@pytest.mark.slow
@pytest.mark.real
def test_the_real_onnx_teacher_s_preprocessing_is_found(real_data: Path) -> None:
    faces = read_bin(real_data / "faces_real" / "lfw_dev.bin")
    path = real_data / "teachers" / "mobilefacenet_512.onnx"
    wrong = check_teacher(load_teacher(path), faces, pairs=40)
    assert "teacher.channels=bgr" in str(wrong.warning)
    assert judged(wrong)[0].preprocessing.channels == "bgr"


@pytest.mark.slow
@pytest.mark.real
def test_the_real_mxnet_teacher_s_preprocessing_is_right(real_data: Path) -> None:
    faces = read_bin(real_data / "faces_real" / "lfw_dev.bin")
    y1 = check_teacher(load_teacher(real_data / "teachers" / "y1"), faces, pairs=40)
    assert y1.warning is None
    assert judged(y1)[0].preprocessing == Preprocessing("rgb", (0.0,) * 3, (1.0,) * 3)
