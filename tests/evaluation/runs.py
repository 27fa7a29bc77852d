"""Folders as finished runs leave them, without the training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from arcface_kd.backbones import get_backbone

NETWORK, DIMENSION = "thin_r18", 16
_STAMP = "Training: 2026-01-02 03:04:05,678-"


def write_run(
    folder: Path, settings: Mapping[str, object], scalars: Mapping[str, Sequence[float]] | None = None, seed: int = 0
) -> Path:
    """A run as the host writes it: ``training.log``, ``tensorboard`` and ``model.pt``."""
    folder.mkdir(parents=True)
    lines = [f"{_STAMP}rank_id: 0"]
    lines += [f"{_STAMP}: {key.ljust(25)}{value}" for key, value in {"network": NETWORK, **settings}.items()]
    lines += [f"{_STAMP}Speed {speed:.2f} samples/sec   Loss 9.0000   Global Step: 1" for speed in (7, 123.4)]
    lines.append(f"{_STAMP}[pairs][4]Accuracy-Flip: 0.50000+-0.10000")
    (folder / "training.log").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if scalars is not None:
        with SummaryWriter(log_dir=str(folder / "tensorboard")) as writer:
            for tag, values in scalars.items():
                for step, value in enumerate(values, start=1):
                    writer.add_scalar(tag, value, step)
    torch.manual_seed(seed)
    torch.save(get_backbone(NETWORK, num_features=DIMENSION).state_dict(), folder / "model.pt")
    return folder
