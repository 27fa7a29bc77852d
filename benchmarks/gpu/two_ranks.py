"""Check 9: two ranks on one GPU, which NCCL refuses and gloo does not, find the gradients of one rank."""

import gc
import os
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from arcface_kd.checkpoints.tensor_file import save_tensors
from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.drop_ins import drop_ins
from arcface_kd.losses.margin import Margin
from arcface_kd.teachers.base import load_teacher
from benchmarks.gpu.checks import Findings, Place
from benchmarks.gpu.inputs import config_of, records
from benchmarks.gpu.processes import new_process

# Their state begins alike whatever the number of ranks.
_METHODS: dict[str, dict[str, Any]] = {
    "adadistill": {},
    "proxylesskd": {},
    "embedding": {"kd_option": "embedding.labels=none"},
    "embedding+rkd": {"kd_option": "embedding.labels=none"},
}
_ROWS, _DIMENSION, _CLASSES = 8, 16, 10
_STEPS, _TOLERANCE = 6, 1e-4


class _Student(nn.Module):
    def __init__(self, dimension: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(192, dimension, generator=generator) / 14)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 14).flatten(1) @ self.weight


def same_gradients(place: Place, found: Findings) -> None:
    """The student's gradient of a step, of one rank and of two with half of the batch each.

    It is the sixth: by then frozen heads replay what they have recorded, with the ranks' collectives between.
    """
    alone = place.scratch / "alone.pt"
    shared = place.scratch / "two_ranks.pt"
    processes = [*_begin(place, 1, alone), *_begin(place, 2, shared)]
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"a rank alone and two ranks ended with {codes}")
    for name in _METHODS:
        one, two = (torch.load(path, weights_only=True)[name] for path in (alone, shared))
        difference = float((one - two).norm() / one.norm())
        found.add(f"{name}: relative difference of the gradient", difference)
        found.expect(difference < _TOLERANCE, f"{name}: two ranks find another gradient, by {difference:.1e}")


def _begin(place: Place, world_size: int, out: Path) -> list[Any]:
    meeting = place.scratch / f"meeting_{world_size}"
    processes = [
        new_process(place, _rank, place, rank, world_size, meeting, out, inside=True) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def _rank(place: Place, rank: int, world_size: int, meeting: Path, out: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = distributed.FileStore(str(meeting), world_size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    classifier = torch.randn(_CLASSES, _DIMENSION, generator=torch.Generator().manual_seed(2))
    teachers = place.scratch / f"classifier_{world_size}.pt"
    if rank == 0:
        save_tensors(teachers, {"weight": classifier})
    distributed.barrier()
    gradients = {name: _gradient(place, rank, world_size, name, keys, teachers) for name, keys in _METHODS.items()}
    if rank == 0:
        save_tensors(out, gradients)
    # As in `process_group`: a DistributedDataParallel must not outlive its group.
    gc.collect()
    distributed.destroy_process_group()


def _gradient(place: Place, rank: int, world_size: int, name: str, keys: dict[str, Any], classifier: Path) -> Tensor:
    """A method's gradient."""
    device, folder = place.device, records(place, 4)
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(_ROWS, 3, 112, 112, generator=generator) * 2 - 1
    labels = torch.randint(_CLASSES, (_ROWS,), generator=generator)
    own = slice(rank * _ROWS // world_size, (rank + 1) * _ROWS // world_size)
    output = place.scratch / f"{name}_of_{world_size}"
    config: EasyDict = config_of(folder, output, _CLASSES, kd=name, batch_size=_ROWS // world_size, **keys)
    if name == "proxylesskd":
        config.kd_classifier = str(classifier)
    distiller = Distiller(KDConfig.from_config(config), load_teacher(_Student(_DIMENSION, 5)))
    made = drop_ins(lambda: config, distiller=distiller)
    student = distiller.watch(_Student(_DIMENSION, 6)).to(device)
    backbone: nn.Module = student
    if world_size > 1:
        backbone = DistributedDataParallel(student, device_ids=[0] if device.type == "cuda" else None)
    head = made.PartialFC_V2(Margin(64.0, 1.0, 0.5, 0.0), _DIMENSION, _CLASSES, 1.0, False).train().to(device)
    for _ in range(_STEPS):
        student.zero_grad()
        head(backbone(images[own].to(device)), labels[own].to(device)).backward()
    gradient: Tensor = student.weight.grad  # type: ignore[assignment]
    return gradient.cpu()
