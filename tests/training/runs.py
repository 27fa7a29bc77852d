"""Configs of short runs, and what these leave."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from easydict import EasyDict

from arcface_kd.config.arcface_torch import BASE
from arcface_kd.evaluation.report.scalars import read_scalars
from arcface_kd.training.trainer import train
from tests.host.trainer.faces import Faces

NETWORK = "python:tests.networks:tiny"


def config_for(faces: Faces, output: Path, **keys: Any) -> EasyDict:
    config = EasyDict(BASE)
    config.update(
        network=NETWORK,
        rec=str(faces.folder),
        num_classes=faces.num_classes,
        num_image=faces.num_image,
        num_epoch=2,
        warmup_epoch=0,
        val_targets=["pairs"],
        embedding_size=32,
        batch_size=16,
        frequent=1,
        verbose=10**6,
        num_workers=0,
        output=str(output),
    )
    config.update(keys)
    return config


def config_file(faces: Faces, output: Path, **keys: Any) -> Path:
    """The same as a file beside the output folder."""
    path = output.with_name(f"{output.name}_config.py")
    config = dict(config_for(faces, output, **keys))
    path.write_text(f"from easydict import EasyDict\n\nconfig = EasyDict({config!r})\n")
    return path


def train_until(epoch: int, config: EasyDict, **keywords: Any) -> None:
    """Train, and be interrupted behind an epoch, counted from 1."""

    class Interruption(Exception):
        pass

    def interrupt(done: int) -> None:
        if done == epoch:
            raise Interruption

    with pytest.raises(Interruption):
        train(config, on_epoch=interrupt, **keywords)


def loss_trace(output: Path) -> list[float]:
    return read_scalars(output / "tensorboard")["loss"].y.tolist()


def same_weights(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def saved(output: Path, name: str = "model.pt") -> Any:
    return torch.load(output / name, weights_only=True)
