"""The device of a rank, and its 16-bit format."""

import torch


def default_device(local_rank: int = 0) -> torch.device:
    """The device of a rank: its own GPU where there is one, the CPU elsewhere."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The 16-bit format that a device multiplies fast: fp16 on a GPU, bf16 on a CPU that has it, None elsewhere."""
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None


def synchronize(device: torch.device) -> None:
    """Wait for all that a GPU was given to do; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
