"""ProxylessKD as one would write it down: each row against each row of the teacher's classifier."""

import torch
from torch import Tensor

from arcface_kd.losses.margin import Margin
from tests.reference.margin_softmax import target_cosine


def proxylesskd_loss(student: Tensor, labels: Tensor, classifier: Tensor, margin: Margin) -> Tensor:
    """Mean cross entropy of the student's rows under the teacher's classes.

    Args:
        student: (B, D).
        labels: (B,), -1 for none.
        classifier: (C, D), of the whole data set.
        margin: without interclass filter.
    """
    losses = []
    for row, label in zip(student, labels.tolist(), strict=True):
        if label < 0:
            continue
        logits = []
        for number, center in enumerate(classifier):
            cosine = row @ center / (row.norm() * center.norm())
            logits.append(margin.scale * (target_cosine(cosine, margin) if number == label else cosine))
        losses.append(torch.stack(logits).logsumexp(0) - logits[label])
    return torch.stack(losses).mean()
