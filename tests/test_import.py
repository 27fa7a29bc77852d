"""What importing the package costs: nothing but torch; no process group, no connection, no optional package."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import arcface_kd

ROOT = Path(__file__).parents[1]

# Packages that only some runs need, and parts of torch that are slow to load.
LATE = {
    "cv2",
    "insightface",
    "matplotlib",
    "mpmath",
    "mxnet",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "PIL",
    "safetensors",
    "scipy",
    "sklearn",
    "sympy",
    "tensorboard",
    "timm",
    "torch._dynamo",
    "torch._inductor",
    "torch.utils.tensorboard",
    "tqdm",
    "unidiff",
    "wandb",
}


# In the order of the layers, from the package itself to those on top.
MODULES = [
    "arcface_kd",
    "arcface_kd.losses.margin_softmax",
    "arcface_kd.methods.adadistill",
    "arcface_kd.config.arcface_torch",
    "arcface_kd.checkpoints.shards",
    "arcface_kd.distillation.head",
    "arcface_kd.host.attach",
    "arcface_kd.cli.main",
    "arcface_kd.training.trainer",
]

WATCH = """
import importlib, json, pkgutil, sys
from tests.no_network import refuse_connections

refuse_connections()
import torch
added = {}
for name in sys.argv[1:]:
    before = set(sys.modules)
    importlib.import_module(name)
    added[name] = sorted(set(sys.modules) - before)
import arcface_kd
for module in pkgutil.walk_packages(arcface_kd.__path__, "arcface_kd."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in ("insightface", "onnxruntime", "onnx", "tensorboard", "cv2"):
    importlib.import_module(name)
state = [torch.distributed.is_initialized(), torch.cuda.is_initialized()]
print(json.dumps([added, state]))
"""


class Imports(NamedTuple):
    """What a fresh interpreter that knows torch has loaded with each module, and what it has opened on the way."""

    added: dict[str, list[str]]
    process_group: bool
    gpu: bool


@pytest.fixture(scope="module")
def imports() -> Imports:
    """Of a process that would have ended at a connection to another machine."""
    done = subprocess.run([sys.executable, "-c", WATCH, *MODULES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    added, (process_group, gpu) = json.loads(done.stdout.splitlines()[-1])
    return Imports(added, process_group, gpu)


def test_importing_the_package_loads_no_more_than_torch(imports: Imports) -> None:
    assert {name for name in imports.added["arcface_kd"] if name.partition(".")[0] != "arcface_kd"} == set()


@pytest.mark.parametrize("module", MODULES)
def test_modules_of_a_run_load_no_optional_package(imports: Imports, module: str) -> None:
    allowed = {"tqdm"} if module == "arcface_kd.training.trainer" else set()
    assert (LATE & set(imports.added[module])) - allowed == set()


def test_importing_opens_no_process_group_and_touches_no_gpu(imports: Imports) -> None:
    assert not imports.process_group
    assert not imports.gpu


def test_every_public_name_is_there() -> None:
    for name in arcface_kd.__all__:
        assert getattr(arcface_kd, name) is not None
        assert name in dir(arcface_kd)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = arcface_kd.nonsense
