"""Logit distillation, grouped and plain, as one would write it down: dense logits, sorted rows, autograd."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, normalize

from arcface_kd.losses.class_groups import BatchMass, FixedSize, GroupRule, SampleMass
from arcface_kd.losses.logit_distillation import Grouping, Logits
from arcface_kd.losses.margin import Margin
from tests.reference.margin_softmax import dense_margin_softmax, target_cosine


def dense_logits(
    embeddings: Tensor, labels: Tensor, centers: Tensor, margin: Margin, logits: Logits, index: Tensor | None = None
) -> Tensor:
    """(B, C) scaled cosines, the target's with the margin if that is distilled; -inf for classes left out."""
    cosine = normalize(embeddings) @ normalize(centers).T
    own = torch.nn.functional.one_hot(labels.clamp_min(0), centers.shape[0]).bool() & (labels >= 0).unsqueeze(1)
    if logits == "margin":
        cosine = cosine.clone()
        cosine[own] = target_cosine(cosine[own], margin)
    logit = margin.scale * cosine
    if index is not None:
        taking_part = torch.zeros(centers.shape[0], dtype=torch.bool)
        taking_part[index] = True
        logit = logit.masked_fill(~(taking_part | own), -torch.inf)
    return logit


def sorted_groups(logits: Tensor, labels: Tensor, rule: GroupRule, temperature: float) -> Tensor:
    """(B, C) bool, the primary classes: rows are sorted with the target in front, classes taken from the top."""
    labelled, classes = labels >= 0, logits.shape[1]
    first = logits.clone()
    first[labelled, labels[labelled]] = torch.inf
    order = first.argsort(dim=1, descending=True)
    if isinstance(rule, FixedSize):
        sizes = torch.full(labels.shape, rule.size)
    elif isinstance(rule, SampleMass):
        mass = (logits / temperature).softmax(1).gather(1, order).cumsum(1)
        sizes = (mass < rule.mass).sum(1) + 1
    else:
        assert isinstance(rule, BatchMass)
        mass = logits.softmax(1)[labelled].mean(0).sort(descending=True).values.cumsum(0)
        reaching = (size for size in range(1, classes + 1, rule.step) if mass[size - 1] >= rule.mass)
        sizes = torch.full(labels.shape, next(reaching, classes))
    primary = torch.zeros_like(logits, dtype=torch.bool)
    primary.scatter_(1, order, torch.arange(classes) < sizes.unsqueeze(1))
    return primary & (logits > -torch.inf)


def mean_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(teacher) || softmax(student)), of what is not -inf."""
    rows = []
    for t, s in zip(teacher, student, strict=True):
        kept = t > -torch.inf
        rows.append(kl_div(s[kept].log_softmax(0), t[kept].log_softmax(0), reduction="sum", log_target=True))
    return torch.stack(rows).mean() if rows else (teacher.sum() + student.sum()) * 0


def dense_distillation(
    embeddings: Tensor,
    labels: Tensor,
    centers: Tensor,
    teacher_embeddings: Tensor,
    teacher_centers: Tensor,
    margin: Margin,
    temperature: float,
    *,
    grouping: Grouping | None = None,
    logits: Logits = "plain",
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ce, primary, binary, secondary) over all classes at once; ``primary`` is of all classes without groups."""
    ce = dense_margin_softmax(embeddings, labels, centers, margin, index)
    valid = labels >= 0
    student = dense_logits(embeddings, labels, centers, margin, logits, index)
    teacher = dense_logits(teacher_embeddings, labels, teacher_centers, margin, logits, index)
    none = ce * 0
    if not bool(valid.any()):
        return ce, none, none, none
    groups = None
    if grouping is not None:
        # Of all rows: the batch's size is a mean over those with a label.
        ranked = student if grouping.ranked_by == "student" else teacher
        groups = sorted_groups(ranked.detach(), labels, grouping.rule, temperature)[valid]
    student, teacher = student[valid] / temperature, teacher[valid] / temperature
    if groups is None:
        return ce, temperature**2 * mean_divergence(teacher, student), none, none
    primary = mean_divergence(teacher.masked_fill(~groups, -torch.inf), student.masked_fill(~groups, -torch.inf))
    others = [row for row in range(len(groups)) if (~groups[row] & (student[row] > -torch.inf)).any()]
    secondary = none
    if others:
        out = groups[others]
        of_rows = mean_divergence(
            teacher[others].masked_fill(out, -torch.inf), student[others].masked_fill(out, -torch.inf)
        )
        secondary = of_rows * len(others) / len(groups)
    binary = []
    for t, s, group in zip(teacher.softmax(1), student.softmax(1), groups, strict=True):
        term = t[group].sum() * (t[group].sum().log() - s[group].sum().log())
        if (t[~group] > 0).any():
            term = term + t[~group].sum() * (t[~group].sum().log() - s[~group].sum().log())
        binary.append(term)
    square = temperature**2
    if grouping is None or not grouping.secondary:
        secondary = none
    return ce, square * primary, square * torch.stack(binary).mean(), square * secondary
