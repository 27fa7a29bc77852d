"""Heads as they are published: every logit at once, gradients by autograd. References to compare with."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, linear, normalize


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
