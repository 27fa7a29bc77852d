"""What makes a checkpoint fit a network."""

import hashlib

from torch import nn


def layout_digest(network: nn.Module) -> str:
    """Digest of the state_dict's names, in order, with shapes and types."""
    lines = (f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in network.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
