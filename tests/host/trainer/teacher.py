"""A teacher for runs of seconds."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.backbones import get_backbone
from arcface_kd.data.dataset import open_dataset
from tests.host.trainer.faces import Faces


class Teacher(NamedTuple):
    """The arguments that name a teacher, and its unit embeddings of the faces, plain, in their order."""

    arguments: list[str]
    file: Path
    embeddings: Tensor


def untrained_teacher(faces: Faces, file: Path, embedding_size: int) -> Teacher:
    """A backbone that was never trained, whose batch norms have seen the faces: enough to tell the patterns apart."""
    images = torch.stack([face.image for face in (open_dataset(faces.folder)[at] for at in range(faces.num_image))])
    torch.manual_seed(0)
    network = get_backbone("thin_r10", num_features=embedding_size).train()
    with torch.no_grad():
        for _ in range(3):
            network(images / 127.5 - 1)
        embeddings = normalize(network.eval()(images / 127.5 - 1))
    torch.save(network.state_dict(), file)
    return Teacher(["--kd-teacher", str(file)], file, embeddings)
