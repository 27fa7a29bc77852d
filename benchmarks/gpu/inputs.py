"""What the checks train on: records of patterns, a teacher's file, configs. Made once in a run, by whoever is first."""

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from easydict import EasyDict
from torch import nn

from arcface_kd.backbones import get_backbone
from arcface_kd.checkpoints.tensor_file import save_tensors
from arcface_kd.config.arcface_torch import BASE
from arcface_kd.data.dataset import open_dataset
from arcface_kd.data.formats.verification_bin import write_bin
from arcface_kd.data.pack import write_identities
from benchmarks.gpu.checks import Place

IMAGES_EACH = 8
DIMENSION = 512


def records(place: Place, identities: int) -> Path:
    """A folder of records, eight images of each identity: its own pattern under noise.

    Args:
        place: of the run.
        identities: number of classes.
    """
    root = place.scratch
    folder = root / f"records_{identities}"
    if not folder.exists():
        made = root / f"records_{identities}.{os.getpid()}"
        write_identities(made, [IMAGES_EACH] * identities, _pictures(identities))
        try:
            made.rename(folder)
        except OSError:
            shutil.rmtree(made)
    return folder


def _pictures(identities: int) -> Iterator[bytes]:
    import cv2

    generator = np.random.default_rng(0)
    for _ in range(identities):
        pattern = cv2.resize(generator.uniform(0, 255, (7, 7, 3)), (112, 112), interpolation=cv2.INTER_CUBIC)
        for _ in range(IMAGES_EACH):
            noise = cv2.resize(generator.normal(0, 40, (28, 28, 3)), (112, 112))
            picture = np.clip(pattern + noise, 0, 255).astype(np.uint8)
            yield cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def verification_set(folder: Path) -> str:
    """Write a verification set of 20 pairs into a folder of records, half of one identity; its name in a config."""
    images = list(_pictures(2))
    first, second = images[:IMAGES_EACH], images[IMAGES_EACH:]
    places = list(itertools.combinations(range(IMAGES_EACH), 2))[:10]
    same = [image for one, other in places for image in (first[one], first[other])]
    unlike = [image for one, other in places for image in (first[one], second[other])]
    write_bin(folder / "pairs.bin", [*same, *unlike], [True] * 10 + [False] * 10)
    return "pairs"


def network(name: str, dimension: int, folder: Path) -> nn.Module:
    """An untrained network whose batch norms have seen some of the records, so that it tells them apart.

    Args:
        name: of arcface_torch.
        dimension: of its embeddings.
        folder: with records.
    """
    torch.manual_seed(0)
    made = get_backbone(name, num_features=dimension)
    for module in made.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    faces = open_dataset(folder)
    images = torch.stack([faces[index].image for index in range(0, min(len(faces), 256), IMAGES_EACH)])
    with torch.no_grad():
        made.train()(images.float() / 127.5 - 1)
    return made.eval()


def teacher_file(place: Place, name: str, dimension: int, folder: Path) -> Path:
    """Such a network's weights in a file."""
    path = place.scratch / f"teacher_{name}_{dimension}.pt"
    if not path.exists():
        save_tensors(path, network(name, dimension, folder).state_dict())
    return path


def config_of(folder: Path, output: Path, identities: int, **keys: Any) -> EasyDict:
    """A merged config of a run over the records in a folder."""
    return EasyDict(
        {
            **BASE,
            "rec": str(folder),
            "output": str(output),
            "num_classes": identities,
            "num_image": identities * IMAGES_EACH,
            "num_epoch": 1,
            "warmup_epoch": 0,
            "val_targets": [],
            "lr": 0.02,
            **keys,
        }
    )
