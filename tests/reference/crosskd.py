"""CrossKD as one would write it down: one channel at a time, one row at a time."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d


def align_scale(student: Tensor, teacher: Tensor) -> Tensor:
    """Each channel of the student's map with the mean and the deviation of the teacher's."""
    channels = []
    for own, other in zip(student.unbind(1), teacher.unbind(1), strict=True):
        channels.append((own - own.mean()) / (own.std(unbiased=True) + 1e-6) * other.std(unbiased=True) + other.mean())
    return torch.stack(channels, 1)


def crosskd_terms(
    student_map: Tensor,
    teacher_map: Tensor,
    tail: Callable[[Tensor], Tensor],
    *,
    adapter: tuple[Tensor, Tensor] | None = None,
    align: bool = True,
    groups: list[int] | None = None,
    labels: Tensor | None = None,
    classifier: Tensor | None = None,
    scale: float = 64.0,
    temperature: float = 4.0,
) -> tuple[Tensor, Tensor]:
    """Mean 1 - cos(e_cross, e_t) and mean T^2 KL(p_t || p_cross) of a batch of maps; ``tail`` embeds one map.

    ``adapter`` are weight (Ct, C) and bias (Ct,) of the 1x1 convolution; ``groups`` the rows of each rank, whose
    statistics are taken apart; rows without a label, and a classifier of None, have no logits compared.
    """
    adapted = student_map
    if adapter is not None:
        adapted = conv2d(adapted, adapter[0][:, :, None, None], adapter[1])
    if adapted.shape[2:] != teacher_map.shape[2:]:
        adapted = adaptive_avg_pool2d(adapted, (teacher_map.shape[2], teacher_map.shape[3]))
    if align:
        sizes = groups or [len(adapted)]
        pairs = zip(adapted.split(sizes), teacher_map.split(sizes), strict=True)
        adapted = torch.cat([align_scale(own, other) if len(own) else own for own, other in pairs])
    mimicry, divergence = [], []
    for number, (own, other) in enumerate(zip(adapted, teacher_map, strict=True)):
        cross, teacher = tail(own[None])[0], tail(other[None])[0].detach()
        cosine = cross @ teacher / (cross.norm() * teacher.norm())
        mimicry.append(1 - cosine)
        if classifier is None or (labels is not None and labels[number] < 0):
            continue
        logits = []
        for embedding in (cross, teacher):
            cosines = torch.stack([embedding @ row / (embedding.norm() * row.norm()) for row in classifier])
            logits.append(scale * cosines / temperature)
        log_cross, log_teacher = (each - each.logsumexp(0) for each in logits)
        divergence.append(temperature**2 * (log_teacher.exp() * (log_teacher - log_cross)).sum())
    zero = student_map.new_zeros(())
    return torch.stack(mimicry).mean(), torch.stack(divergence).mean() if divergence else zero
