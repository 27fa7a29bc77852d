"""What trainers read of arcface_torch's ``PartialFC_V2`` besides calling it, to log accuracies or to add losses."""

from typing import Any, cast

from torch import Tensor, nn

from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.methods.base import Method


class PartialFCNames:
    """The attributes of ``PartialFC_V2`` of a head that has its classes in a ``shard``."""

    shard: ClassShard
    methods: nn.ModuleDict
    _settings: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        """This rank's class centers, (num_local, D), any norms; an AttributeError where no method classifies."""
        module, _, entry = (class_centers(self.methods) or "").removeprefix("methods.").rpartition(".")
        if not module:
            raise AttributeError("weight")
        centers: Tensor = getattr(self.methods.get_submodule(module), entry)
        return centers

    @property
    def class_start(self) -> int:
        """The first class of this rank."""
        return self.shard.start

    @property
    def num_local(self) -> int:
        """The number of this rank's classes."""
        return self.shard.size

    @property
    def sample_rate(self) -> float:
        """The share of classes a step."""
        return float(self._settings["sample_rate"])


def class_centers(methods: nn.ModuleDict) -> str | None:
    """Name of the state's entry with the class centers that the student is scored against; None where there is none."""
    for name, module in methods.items():
        method = cast(Method, module)
        if method.classifies and method.sharded:
            return f"methods.{name}.{method.sharded[0]}"
    return None
