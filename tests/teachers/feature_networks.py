"""Small networks with the module names of arcface_torch's, and one whose names tell nothing."""

from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def seeded(network: Network, seed: int) -> Network:
    """Weights and running statistics of all sizes, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            if value.is_floating_point():
                fan = max(1, value[0].numel()) if value.dim() > 1 else 1
                value.copy_(torch.randn(value.shape, generator=generator) / fan**0.5)
                if name.endswith("running_var"):
                    value.abs_().add_(0.5)
    return network.eval()


class Plain(nn.Module):
    """Nobody's network: 16x16 images to a map (6, 4, 4), to an embedding; its batch size comes from the map."""

    def __init__(self, dimension: int = 5, channels: int = 6) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.PReLU(4))
        self.second = nn.Sequential(nn.Conv2d(4, channels, 3, 2, 1), nn.BatchNorm2d(channels))
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(16 * channels, dimension), nn.BatchNorm1d(dimension)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(images)))


class Around(Plain):
    """As Plain, with a way around its second stage."""

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        return self.head(self.second(first) + first.mean((1, 2, 3), keepdim=True))


class Iresnet(nn.Module):
    """An iresnet's modules on 32x32 images; the last map is (8, 2, 2)."""

    def __init__(self, dimension: int = 5) -> None:
        super().__init__()
        self.conv1, self.prelu = nn.Conv2d(3, 4, 3, 1, 1), nn.PReLU(4)
        for number, (before, behind) in enumerate([(4, 4), (4, 6), (6, 6), (6, 8)], start=1):
            self.add_module(f"layer{number}", nn.Sequential(nn.Conv2d(before, behind, 3, 2, 1), nn.PReLU(behind)))
        self.bn2, self.dropout = nn.BatchNorm2d(8), nn.Dropout(0.4, inplace=True)
        self.fc, self.features = nn.Linear(32, dimension), nn.BatchNorm1d(dimension)

    def forward(self, images: Tensor) -> Tensor:
        x = self.prelu(self.conv1(images))
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        x = self.dropout(torch.flatten(self.bn2(x), 1))
        return self.features(self.fc(x))


class Vit(nn.Module):
    """A vit's modules on 16x16 images: 16 tokens of 8 channels; in training, tokens are left out and put back."""

    def __init__(self, dimension: int = 5) -> None:
        super().__init__()
        self.embed_dim = 8
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU6()) for _ in range(2)])
        self.norm = nn.LayerNorm(8)
        self.feature = nn.Sequential(nn.Linear(128, 8, bias=False), nn.Linear(8, dimension), nn.BatchNorm1d(dimension))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        kept = x[:, :12] if self.training else x
        for block in self.blocks:
            kept = kept + block(kept)
        kept = self.norm(kept)
        if self.training:
            kept = torch.cat([kept, kept.new_zeros(len(images), 4, 8)], 1)
        return self.feature(torch.reshape(kept, (len(images), 128)))
