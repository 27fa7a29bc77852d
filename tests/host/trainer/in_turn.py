"""Run a trainer several times in one process: ``python in_turn.py RUNS.json``, in the trainer's folder.

Each run is all that ``python train_v2.py ARGUMENTS`` does, from its imports to its last file, with its config read
afresh; only torch and the process group are there already, which saves most of the time that a short run takes. What
a machine without a GPU cannot have, a run can ask a stand-in for, by name.
"""

import contextlib
import functools
import importlib
import json
import logging
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn


class DaliBatches:
    """What NVIDIA's loader gives: batches of records with labels (b, 1), float, without a sampler."""

    def __init__(self, batch_size: int, rec_file: str, local_rank: int, squeezed: bool, **_: object) -> None:
        from arcface_kd.data.loader import get_dataloader

        folder = os.path.dirname(rec_file)
        self.batches = get_dataloader(folder, local_rank, batch_size, seed=2048, num_workers=0)
        self.squeezed = squeezed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            yield images, (labels.squeeze() if self.squeezed else labels.float().view(-1, 1))

    def reset(self) -> None:
        """The host calls it after each epoch."""


def dali(squeezed: bool) -> Any:
    return mock.patch.object(
        importlib.import_module("dataset"), "dali_data_iter", functools.partial(DaliBatches, squeezed=squeezed)
    )


@contextlib.contextmanager
def cpu_amp() -> Iterator[None]:
    """fp16 as a CPU has it: bf16 by autocast, and a gradient scaler that works."""

    def autocast(enabled: bool = True) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

    # The host sends gradients as fp16, which overflows for several steps under the scale that a run begins with.
    scaler = functools.partial(torch.amp.GradScaler, "cpu", init_scale=64.0)
    with (
        mock.patch.object(torch.cuda.amp, "autocast", autocast),
        mock.patch.object(torch.cuda.amp.grad_scaler, "GradScaler", scaler),
    ):
        yield


def no_batch_norm() -> Any:
    """A network without batch norm, which would need two rows and would depend on the number of ranks."""

    def get_model(name: str, num_features: int = 512, **_: object) -> nn.Module:
        layers = (nn.AvgPool2d(7), nn.Conv2d(3, 16, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16 * 7 * 7, num_features))
        return nn.Sequential(*layers)

    return mock.patch.object(importlib.import_module("backbones"), "get_model", get_model)


def short_synthetic() -> Any:
    """The synthetic data set without its million images."""
    from arcface_kd.data.dataset import SyntheticDataset

    return mock.patch.object(SyntheticDataset, "__len__", return_value=32)


STAND_INS: dict[str, Callable[[], Any]] = {
    "cpu_amp": cpu_amp,
    "dali": functools.partial(dali, squeezed=False),
    "dali_squeezed": functools.partial(dali, squeezed=True),
    "no_batch_norm": no_batch_norm,
    "short_synthetic": short_synthetic,
}


def run(arguments: list[str], stand_ins: list[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        del sys.modules[name]
    logging.getLogger().handlers.clear()
    with contextlib.ExitStack() as stack:
        for name in stand_ins:
            stack.enter_context(STAND_INS[name]())
        if distributed.is_initialized():
            stack.enter_context(mock.patch.object(distributed, "init_process_group"))
        stack.enter_context(mock.patch.object(sys, "argv", ["train_v2.py", *arguments]))
        runpy.run_path("train_v2.py", run_name="__main__")


def main() -> None:
    # Python puts the folder of the script that it is given there, and that would be the trainer's.
    sys.path[0] = os.getcwd()
    # Neither is to be needed by a run that does not ask for it.
    sys.modules["wandb"] = sys.modules["nvidia"] = None  # type: ignore[assignment]
    for each in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(each["arguments"], each["stand_ins"])
        # In one write, as the ranks share a file.
        sys.stdout.write(f"finished {each['name']} on rank {distributed.get_rank()}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
