"""The batches of an epoch, with the views that they show."""

import torch

from arcface_kd.data.loader import BatchViews, FaceLoader


def epoch_of(loader: FaceLoader) -> list[tuple[torch.Tensor, torch.Tensor, BatchViews]]:
    """Images, labels and views of each batch; the views are told just before their batch comes."""
    views: list[BatchViews] = []
    loader.on_batch = views.append
    batches = []
    for number, (images, labels) in enumerate(loader, start=1):
        assert len(views) == number
        batches.append((images, labels, views[-1]))
    return batches
