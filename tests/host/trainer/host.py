"""Copies of the real trainer, patched by our own command, and configs for runs of a few steps in them."""

import shutil
from pathlib import Path

from arcface_kd.host.patching import patch_checkout
from tests.host.trainer.faces import Faces


def checkout(arcface_torch: Path, folder: Path, *patches: str) -> Path:
    """Copy a checkout and patch the copy; returns its folder."""
    shutil.copytree(arcface_torch, folder)
    patch_checkout(folder, patches)
    return folder


def settings(faces: Faces, output: Path, **changes: object) -> dict[str, object]:
    """A config's keys for a run of a few steps."""
    keys: dict[str, object] = {
        "rec": str(faces.folder),
        "num_classes": faces.num_classes,
        "num_image": faces.num_image,
        "num_epoch": 1,
        "warmup_epoch": 0,
        "val_targets": [],
        "network": "mbf",
        "batch_size": 8,
        "lr": 0.02,
        "frequent": 1,
        "num_workers": 1,
        "save_all_states": True,
        "output": str(output),
    }
    return {**keys, **changes}
