"""RKD as the paper writes it: every pair and every triple, one after the other."""

import torch
from torch import Tensor


def _unit(rows: Tensor) -> list[Tensor]:
    return [row / row.norm() for row in rows]


def _huber(difference: Tensor) -> Tensor:
    size = difference.abs()
    return 0.5 * difference**2 if float(size.detach()) < 1 else size - 0.5


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


def _relative_distances(rows: Tensor) -> dict[tuple[int, int], Tensor]:
    unit = _unit(rows)
    count = len(unit)
    found = {
        (i, j): rows.new_zeros(()) if _same(unit[i], unit[j]) else (unit[i] - unit[j]).norm()
        for i in range(count)
        for j in range(count)
    }
    positive = [distance for distance in found.values() if float(distance.detach()) > 0]
    if not positive:
        return found
    mean = torch.stack(positive).mean()
    return {pair: distance / mean for pair, distance in found.items()}


def _angles(rows: Tensor) -> dict[tuple[int, int, int], Tensor]:
    unit = _unit(rows)
    count = len(unit)

    def direction(i: int, j: int) -> Tensor:
        if _same(unit[i], unit[j]):
            return torch.zeros_like(unit[i])
        return (unit[i] - unit[j]) / (unit[i] - unit[j]).norm()

    return {
        (i, j, k): direction(i, j) @ direction(k, j) for i in range(count) for j in range(count) for k in range(count)
    }


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The distance term, unweighted, of (B, D) and (B, Dt)."""
    of_student, of_teacher = _relative_distances(student), _relative_distances(teacher)
    return torch.stack([_huber(of_student[pair] - of_teacher[pair]) for pair in of_student]).mean()


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """The angle term, unweighted, of (B, D) and (B, Dt)."""
    of_student, of_teacher = _angles(student), _angles(teacher)
    return torch.stack([_huber(of_student[triple] - of_teacher[triple]) for triple in of_student]).mean()
