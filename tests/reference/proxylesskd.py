"""ProxylessKD as one would write it down: each row against each row of the teacher's classifier."""

import torch
from torch import Tensor

from arcface_kd.losses.margin import Margin
from tests.reference.margin_softmax import target_cosine


def proxylesskd_loss(student: Tensor, labels: Tensor, classifier: Tensor, margin: Margin | list[Margin]) -> Tensor:
    """Mean cross entropy of rows (B, D) under the teacher's classes (C, D), with one margin or one for each row."""
    losses = []
    margins = margin if isinstance(margin, list) else [margin] * len(labels)
    for row, label, own in zip(student, labels.tolist(), margins, strict=True):
        if label < 0:
            continue
        logits = []
        for number, center in enumerate(classifier):
            cosine = row @ center / (row.norm() * center.norm())
            logits.append(own.scale * (target_cosine(cosine, own) if number == label else cosine))
        losses.append(torch.stack(logits).logsumexp(0) - logits[label])
    return torch.stack(losses).mean()
