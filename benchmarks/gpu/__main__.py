"""The command behind ``make gpu``."""

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.bare_machine import NEEDED, make_importable, missing

# The checks' own limits add up to less; what is left is for starting them.
_SECONDS = 475.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the thirteen checks of one GPU, each in a process of its own; write results.json and results.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=main.__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to try the checks")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the results (default: gpu)")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of packages that the machine lacks")
    parser.add_argument("--only", default="", help="numbers of checks, as 3,4; all by default")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="arcface_kd_gpu_") as scratch:
        make_importable(Path(scratch) / "site", options.wheels)
        lacking = missing()
        if lacking:
            print(f"missing: {', '.join(lacking)}\n{NEEDED}", file=sys.stderr)
            return 2
        return _run(options, Path(scratch))


def _run(options: argparse.Namespace, scratch: Path) -> int:
    # Only now can torch and the package be imported.
    import torch

    from benchmarks.gpu.checks import CHECKS, Place
    from benchmarks.gpu.page import page
    from benchmarks.gpu.processes import run_check

    host = os.environ.get("ARCFACE_TORCH")
    place = Place(
        device=torch.device(options.device),
        tiny=options.device == "cpu",
        scratch=scratch,
        host=Path(host).resolve() if host else None,
    )
    if host is None:
        print("ARCFACE_TORCH is not set: no run of arcface_torch's trainer, no time of its head")
    wanted = {int(number) for number in options.only.split(",") if number}
    options.out.mkdir(parents=True, exist_ok=True)
    began, outcomes = time.monotonic(), []
    for check in CHECKS:
        if wanted and check.number not in wanted:
            continue
        left = _SECONDS - (time.monotonic() - began)
        # A CPU may be a busy one, and nobody has lent it.
        limit = 10.0 * check.seconds if place.tiny else max(1.0, min(check.seconds, left))
        outcome = run_check(check, place, limit)
        outcomes.append(outcome)
        print(f"{check.number:3} {outcome['status']:9} {outcome['seconds']:6.1f} s  {check.title}", flush=True)
        for fault in outcome["faults"]:
            print(f"      {fault.splitlines()[0] if fault else ''}", flush=True)
        # After each one: whoever stops this has what there is.
        run = _about(options.device, time.monotonic() - began, outcomes)
        (options.out / "results.json").write_text(json.dumps({**run, "checks": outcomes}, indent=1), encoding="utf-8")
        (options.out / "results.md").write_text(page(run, outcomes), encoding="utf-8")
    print(f"written: {options.out / 'results.json'}, {options.out / 'results.md'}")
    return int(any(outcome["status"] in ("failed", "timed out") for outcome in outcomes))


def _about(device: str, seconds: float, outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from benchmarks.record import commit

    card = next((each["numbers"].get("device") for each in outcomes if each["number"] == 1), None)
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "device": card or device,
        "tiny": device == "cpu",
        "commit": commit(),
        "date": f"{now:%Y-%m-%d}",
        "seconds": seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
