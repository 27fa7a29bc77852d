"""Checks 1 and 2: what the machine has, and the tests that are marked ``gpu``."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.gpu import one_share
from benchmarks.gpu.bare_machine import ROOT
from benchmarks.gpu.checks import Findings, Place

_PACKAGES = ("torch", "triton", "numpy", "onnx", "onnxruntime", "timm", "opencv-python-headless", "easydict", "pytest")
# Of the tests: most of a test's time goes into compiling kernels, and eighty take one process a quarter of an hour.
_PROCESSES = 8


def versions(place: Place, found: Findings) -> None:
    """Names and versions, onnxruntime's providers, and fp32 results of 16-bit factors."""
    import onnxruntime

    found.add("python", platform.python_version())
    for name in _PACKAGES:
        try:
            found.add(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            found.add(name, "none")
    found.add("onnxruntime providers", ", ".join(onnxruntime.get_available_providers()))
    found.add("CPU cores", len(os.sched_getaffinity(0)))
    if place.device.type == "cuda":
        card = torch.cuda.get_device_properties(0)
        found.add("device", card.name)
        found.add("memory, GB", card.total_memory / 1e9)
        found.add("compute capability", f"{card.major}.{card.minor}")
        found.add("CUDA", str(torch.version.cuda))
        found.add("cuDNN", str(torch.backends.cudnn.version()))
        found.add("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        found.add("device", f"CPU {platform.machine()}")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 512, generator=generator).half() for _ in range(2))
    exact = left.double() @ right.double().T
    try:
        met = torch.mm(left.to(place.device), right.to(place.device).T, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        found.add("fp16 factors with an fp32 result", str(error).splitlines()[0])
        found.expect(place.device.type != "cuda", f"torch.mm(..., out_dtype=torch.float32): {error}")
        return
    difference = float((met.cpu() - exact).norm() / exact.norm())
    found.add("fp16 factors with an fp32 result, error of the product", difference)
    found.expect(met.dtype == torch.float32 and difference < 1e-5, f"the product's error is {difference:.1e}")


def marked_tests(place: Place, found: Findings, folder: Path = ROOT / "tests") -> None:
    """``pytest -m gpu``; files without such a test are not even imported, as they may need other packages."""
    files = [str(path) for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    out = place.scratch / "gpu_tests.jsonl"
    out.touch()
    of = 1 if place.tiny else _PROCESSES
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-p", one_share.__name__]
    running = [
        subprocess.Popen([*command, *files], cwd=ROOT, env={**os.environ, one_share.SHARE: f"{number}/{of}:{out}"})
        for number in range(of)
    ]
    while any(process.poll() is None for process in running):
        # Whoever ends this has what there is.
        time.sleep(1)
        _count(_outcomes(out), found)
    outcomes = _outcomes(out)
    _count(outcomes, found)
    for each in outcomes:
        found.expect(each["outcome"] != "failed", f"{each['test']}: {each['said']}")
    # 1: a test has failed. 5: more shares than tests.
    codes = sorted({process.returncode for process in running} - {0, 1, 5})
    found.expect(not codes and bool(outcomes), f"pytest ended with {codes} and ran {len(outcomes)} tests")
    if place.device.type == "cuda":
        found.expect(any(each["outcome"] == "passed" for each in outcomes), "no test marked gpu has run")


def _outcomes(file: Path) -> list[dict[str, str]]:
    # The last line may be on its way.
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def _count(outcomes: Sequence[dict[str, str]], found: Findings) -> None:
    for name in ("passed", "skipped", "failed"):
        found.add(name, sum(each["outcome"] == name for each in outcomes))
