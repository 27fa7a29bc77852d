"""The stand-in's loader: flips drawn by the workers, batches as lists of images and labels."""

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from arcface_kd.data.dataset import open_dataset


class FlippedFaces(Dataset[tuple[Tensor, int]]):
    """Faces in [-1, 1], each flipped with probability one half."""

    def __init__(self, root: str) -> None:
        self.faces = open_dataset(root)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        face = self.faces[index]
        image = face.image.flip(-1) if torch.rand(1) < 0.5 else face.image
        return (image / 255 - 0.5) / 0.5, face.label

    def __len__(self) -> int:
        return len(self.faces)


def get_dataloader(
    root_dir: str,
    local_rank: int,
    batch_size: int,
    dali: bool = False,
    dali_aug: bool = False,
    seed: int = 2048,
    num_workers: int = 2,
) -> DataLoader[tuple[Tensor, int]]:
    """Called with seven positional arguments."""
    faces = FlippedFaces(root_dir)
    sampler: DistributedSampler[tuple[Tensor, int]] = DistributedSampler(
        faces, num_replicas=distributed.get_world_size(), rank=distributed.get_rank(), shuffle=True, seed=seed
    )
    return DataLoader(faces, batch_size=batch_size, sampler=sampler, num_workers=num_workers, drop_last=True)
