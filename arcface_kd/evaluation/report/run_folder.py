"""A finished run, read back from the files that the trainers leave: settings, curves, model."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from arcface_kd.backbones import KNOWN_NAMES, OWN, is_network
from arcface_kd.backbones.vit import HOST_NAMES, VITS
from arcface_kd.errors import ConfigError, DataError
from arcface_kd.evaluation.report.scalars import Curve, read_scalars
from arcface_kd.system.device import autocast_dtype
from arcface_kd.teachers.checkpoint import backbone_file, load_network

# Both trainers write each key of their config as `: key` and spaces up to the value.
_SETTING = re.compile(r"^Training: [-0-9]+ [:0-9,]+-: (\w+) +(.*)$")
_SPEED = re.compile(r"Speed ([0-9]+(?:\.[0-9]+)?) samples/sec")
_VITS = dict.fromkeys((*VITS, *HOST_NAMES))
_TERM = "kd/gradient_norm/"


@dataclass(frozen=True)
class RunFolder:
    """What a run left."""

    folder: Path  # its output folder
    name: str  # what to call it
    settings: Mapping[str, str]  # its config's keys, as text; empty where there is no ``training.log``
    curves: Mapping[str, Curve]  # TensorBoard scalars by tag; empty where it wrote none
    training_speed: float | None  # images a second while training, as last logged; None where the log says nothing

    @property
    def method(self) -> str:
        """The ``kd`` key: a method or several; ``alone`` for a run without, ``-`` for one that left no log."""
        if not self.settings:
            return "-"
        method = self.settings.get("kd", "")
        return method if method not in ("", "None") else "alone"

    @property
    def network(self) -> str:
        """The student's architecture: as its log has it, else as its tensors tell."""
        return self.settings.get("network") or load_network(self.folder).name

    def loss_terms(self) -> dict[str, Curve]:
        """The curves of the loss terms by their names; of a run without the drop-in head, its ``loss`` alone."""
        names = [tag.removeprefix(_TERM) for tag in self.curves if tag.startswith(_TERM)]
        terms = {name: self.curves[f"kd/{name}"] for name in names if f"kd/{name}" in self.curves}
        if not terms and "loss" in self.curves:
            terms["loss"] = self.curves["loss"]
        return terms

    def family(self, prefix: str) -> dict[str, Curve]:
        """Curves whose tag begins with ``prefix``, by the rest of the tag."""
        return {tag.removeprefix(prefix): curve for tag, curve in self.curves.items() if tag.startswith(prefix)}

    def load(self, device: torch.device | str = "cpu", own_networks: Collection[str] = ()) -> nn.Module:
        """The trained student, in the number format that it was trained and verified in.

        ``own_networks`` are ``python:MODULE:FUNCTION`` of the networks that may be imported; a log's word alone does
        not run code.
        """
        network = self.settings.get("network")
        self.check_network(own_networks)
        where = torch.device(device)
        narrow = self.half and autocast_dtype(where) is not None
        student = load_network(self.folder, network, fp16=narrow).network
        placed: nn.Module = student.to(where)
        placed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return placed.eval()

    def check_network(self, own_networks: Collection[str]) -> None:
        """Refuse a network that this package cannot build, or may not import."""
        network = self.settings.get("network")
        if network is None or network in _VITS or network in own_networks:
            return
        if network.startswith(OWN):
            raise ConfigError(
                f"{self.folder}: its training.log names the network {network!r}, which is Python code and is not run "
                f"on a log's word; if you trust it, add --network {network}"
            )
        if not is_network(network):
            raise ConfigError(
                f"{self.folder}: its network {network!r} is none that arcface_kd builds: wanted one of "
                f"{', '.join(_VITS)}, {KNOWN_NAMES}"
            )

    @property
    def half(self) -> bool:
        """Whether its config asks for 16-bit convolutions."""
        return self.settings.get("fp16") == "True"


def read_run(folder: str | os.PathLike[str], name: str | None = None) -> RunFolder:
    """Read a run's settings and curves; its weights are read later."""
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"{path} is no folder; wanted the output folder of a run")
    if backbone_file(path) is None:
        raise DataError(f"{path} holds no model.pt, which a run writes after each epoch; wanted a run's output folder")
    settings: dict[str, str] = {}
    speed = None
    log = path / "training.log"
    if log.is_file():
        with log.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if found := _SETTING.match(line.rstrip("\n")):
                    settings[found[1]] = found[2]
                elif spoken := _SPEED.search(line):
                    speed = float(spoken[1])
    events = path / "tensorboard"
    curves = read_scalars(events) if any(events.glob("events.out.tfevents.*")) else {}
    return RunFolder(path, name or path.resolve().name, settings, curves, speed)
