"""Heads as they are published: every logit at once, gradients by autograd. References to compare with."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, linear, normalize


class DenseAdaDistill(nn.Module):
    """What the published AdaDistill head does in a step (Boutros, Struc, Damer, arXiv 2407.01332).

    The centers are a replicated parameter (D, C) in autograd's graph. They are normalised as a whole, all B x C cosines
    go through acos and cos, the margins are a dense one-hot matrix, and the gradient in the parameter is found and
    kept though nobody uses it; nothing ever sets it to zero.

    Args:
        classes: number of classes C.
        dimension: D.
        scale: the logit scale.
        margin: ArcFace's additive margin.
    """

    def __init__(self, classes: int, dimension: int, scale: float, margin: float) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.empty(dimension, classes).normal_(std=0.01))
        self.scale, self.margin = scale, margin

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Update the centers of the batch, then the loss.

        Args:
            student: (B, D).
            teacher: (B, D).
            labels: (B,), -1 for none.
        """
        student, teacher = normalize(student), normalize(teacher)
        with torch.no_grad():
            before = self.centers[:, labels].T
            agreement = cosine_similarity(student, teacher)
            alpha = (agreement * cosine_similarity(before, teacher).clamp(1e-6, 1)).clamp(1e-6, 1).unsqueeze(1)
            self.centers[:, labels] = (alpha * before + (1 - alpha) * teacher).T
        unit = self.centers / self.centers.norm(dim=0, keepdim=True)
        cosine = (student @ unit).clamp(-1, 1)
        labelled = torch.where(labels != -1)[0]
        margins = torch.zeros(labelled.shape[0], cosine.shape[1], device=cosine.device)
        margins.scatter_(1, labels[labelled].unsqueeze(1), self.margin)
        angles = cosine.acos_()
        angles[labelled] += margins
        return cross_entropy(angles.cos_().mul_(self.scale), labels)


class DenseClassifier(nn.Module):
    """A learned classifier under ArcFace's margin, as one would write it down without a thought of its cost.

    Args:
        weight: (C, D) class centers to start from; copied.
        scale: the logit scale.
        margin: ArcFace's additive margin.
    """

    def __init__(self, weight: Tensor, scale: float, margin: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.scale, self.margin = scale, margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss.

        Args:
            embeddings: (B, D).
            labels: (B,).
        """
        cosine = linear(normalize(embeddings), normalize(self.weight)).clamp(-1, 1)
        column = labels.unsqueeze(1)
        own = torch.cos(cosine.gather(1, column).acos() + self.margin)
        return cross_entropy(cosine.scatter(1, column, own) * self.scale, labels)


class DenseGKD(nn.Module):
    """A step of Grouped KD as the published code does it (Zhao et al., arXiv 2304.04462).

    All B x C logits of both sides carry CosFace's margin as a dense one-hot matrix. Rows of the student's softmax are
    sorted as a whole with the target in front, the group is a dense mask, 1000 is taken from the logits outside it, and
    autograd keeps whatever it needs.

    Args:
        weight: (C, D) the student's class centers to start from; copied.
        teacher: (C, D) the teacher's classifier.
        scale: the logit scale.
        margin: CosFace's additive margin.
        temperature: T.
        size: a fixed number of primary classes, or None for the cumulative probability.
        mass: the cumulative probability that a batch's mean must reach.
        primary_weight: of the KL inside the primary group.
    """

    def __init__(
        self,
        weight: Tensor,
        teacher: Tensor,
        scale: float,
        margin: float,
        temperature: float,
        size: int | None,
        mass: float,
        primary_weight: float,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.teacher = teacher
        self.scale, self.margin, self.temperature = scale, margin, temperature
        self.size, self.mass, self.primary_weight = size, mass, primary_weight

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The loss.

        Args:
            student: (B, D).
            teacher: (B, D).
            labels: (B,).
        """
        own = nn.functional.one_hot(labels, self.weight.shape[0]).to(student.dtype)
        logits = self.scale * (linear(normalize(student), normalize(self.weight)) - self.margin * own)
        with torch.no_grad():
            wanted = self.scale * (linear(normalize(teacher), normalize(self.teacher)) - self.margin * own)
            order = (logits + 1e6 * own).sort(dim=1, descending=True).indices
            size = self.size
            if size is None:
                mass = logits.softmax(1).mean(0).sort(descending=True).values.cumsum(0)
                size = 1 + 100 * int((mass[::100] < self.mass).sum())
            primary = torch.zeros_like(logits).scatter_(1, order[:, :size], 1.0)
        soft, soft_wanted = logits / self.temperature, wanted / self.temperature
        inside = kl_div(
            (soft - 1000 * (1 - primary)).log_softmax(1),
            (soft_wanted - 1000 * (1 - primary)).softmax(1),
            reduction="batchmean",
        )
        student_groups, teacher_groups = (
            torch.stack([(p * primary).sum(1), (p * (1 - primary)).sum(1)], 1)
            for p in (soft.softmax(1), soft_wanted.softmax(1))
        )
        groups = kl_div(student_groups.log(), teacher_groups, reduction="batchmean")
        square = self.temperature**2
        return cross_entropy(logits, labels) + square * (self.primary_weight * inside + groups)
