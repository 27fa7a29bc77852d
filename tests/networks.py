"""Small networks for tests that train: ``python:tests.networks:tiny``, also in processes that tests start."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from arcface_kd.backbones import get_backbone


class Tiny(nn.Module):
    """A (B, D) embedding of 112x112 faces in well under a millisecond: two convolutions over 14x14 means."""

    def __init__(self, num_features: int, fp16: bool) -> None:
        super().__init__()
        self.fp16 = fp16
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.PReLU(8)),
            *(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.Flatten()),
        )
        self.fc = nn.Linear(16 * 4 * 4, num_features)

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.fp16):
            embeddings = self.fc(self.features(avg_pool2d(images, 8)))
        return torch.as_tensor(embeddings).float()


def tiny(num_features: int = 512, fp16: bool = False) -> nn.Module:
    return Tiny(num_features, fp16)


def untrained_file(folder: Path, network: str, num_features: int) -> Path:
    """The weights of a backbone that nobody has trained, the same in every run: a teacher for runs of seconds."""
    torch.manual_seed(7)
    path = folder / "teacher.pt"
    torch.save(get_backbone(network, num_features=num_features).state_dict(), path)
    return path
