"""Students that look trained, and what is compared of them."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from arcface_kd.backbones import FaceBackbone, get_backbone

CPU = ["CPUExecutionProvider"]
D = 32


def trained(name: str, faces: np.ndarray, seed: int = 0) -> FaceBackbone:
    """A network whose batch norms know faces, and whose slopes, scales and offsets are not those of a fresh one."""
    torch.manual_seed(seed)
    network = get_backbone(name, num_features=D)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.5)
    with torch.no_grad():
        network(network_input(faces))
    return network.eval()


def network_input(faces: np.ndarray) -> torch.Tensor:
    """RGB (N, 112, 112, 3) as a student sees it."""
    return (torch.from_numpy(np.ascontiguousarray(faces.transpose(0, 3, 1, 2))).float() - 127.5) / 127.5


def embeddings_of(network: nn.Module, faces: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network(network_input(faces)).numpy()


def cosines(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (first * other).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(other, axis=1)


def run_of(folder: Path, network: nn.Module) -> Path:
    folder.mkdir()
    torch.save(network.state_dict(), folder / "model.pt")
    return folder
