"""Checks 1 and 2: what the machine has, and the tests that are marked ``gpu``."""

import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from importlib.util import find_spec

import torch

from benchmarks.gpu.bare_machine import ROOT
from benchmarks.gpu.checks import Findings, Place

_PACKAGES = ("torch", "triton", "numpy", "onnx", "onnxruntime", "timm", "opencv-python-headless", "easydict", "pytest")


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


def marked_tests(place: Place, found: Findings) -> None:
    """``pytest -m gpu``; files without such a test are not even imported, as they may need other packages."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    report = place.scratch / "gpu_tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    # Most of a test's time goes into compiling kernels. pytest-benchmark, where it is installed, warns beside xdist.
    workers = ["-n", "4", "-p", "no:benchmark"] if find_spec("xdist") and place.device.type == "cuda" else []
    ended = subprocess.run([*command, *workers, *files], cwd=ROOT)
    if not report.exists():
        return found.expect(False, f"pytest ended with {ended.returncode} and ran no test")
    found.expect(ended.returncode == 0, f"pytest ended with {ended.returncode}")
    cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = [
        next((part.tag for part in case if part.tag in ("failure", "error", "skipped")), "passed") for case in cases
    ]
    for outcome in ("passed", "skipped", "failure", "error"):
        found.add(outcome, outcomes.count(outcome))
    for case, outcome in zip(cases, outcomes, strict=True):
        if outcome in ("failure", "error"):
            lines = (case.findtext(outcome) or "").strip().splitlines()
            found.expect(False, f"{case.get('classname')} {case.get('name')}: {lines[-1] if lines else ''}")
    if place.device.type == "cuda":
        found.expect("passed" in outcomes, "no test marked gpu has run")
