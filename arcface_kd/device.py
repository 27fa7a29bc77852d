"""Where a rank computes."""

import torch


def training_device(local_rank: int = 0) -> torch.device:
    """The device of a rank: its own GPU where there is one, the CPU elsewhere.

    Args:
        local_rank: the rank's number on its machine, as ``torchrun`` gives it in ``LOCAL_RANK``.

    Returns:
        ``cuda:local_rank`` or ``cpu``.
    """
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
