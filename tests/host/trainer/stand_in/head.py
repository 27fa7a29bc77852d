"""The stand-in's margin and head, with the attributes and signatures of arcface_torch's."""

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy, linear, normalize, one_hot


class CombinedMarginLoss(torch.nn.Module):
    """The attributes that a margin is read from, and an additive margin on the cosine for the run without KD."""

    def __init__(self, s: float, m1: float, m2: float, m3: float, interclass_filtering_threshold: float = 0) -> None:
        super().__init__()
        self.s = s
        self.m1 = m1
        self.m2 = m2
        self.m3 = m3
        self.interclass_filtering_threshold = interclass_filtering_threshold

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.s * (logits - max(self.m2, self.m3) * one_hot(labels, logits.shape[1]))


class PartialFC_V2(torch.nn.Module):
    """A classifier that every rank has whole; its gradient is averaged, since DDP wraps the backbone only."""

    def __init__(
        self,
        margin_loss: CombinedMarginLoss,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.normal(0, 0.01, (num_classes, embedding_size)))
        self.weight.register_hook(self._average)
        self.margin_softmax = margin_loss

    @staticmethod
    def _average(gradient: Tensor) -> Tensor:
        summed = gradient.clone()
        distributed.all_reduce(summed)
        return summed / distributed.get_world_size()

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        labels = local_labels.squeeze_().long()
        cosines = linear(normalize(local_embeddings), normalize(self.weight))
        return cross_entropy(self.margin_softmax(cosines, labels), labels)
