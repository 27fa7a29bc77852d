"""The command behind ``make gpu``."""

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.gpu.bare_machine import NEEDED, make_importable, missing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the thirteen checks of one GPU, each in a process of its own; write results.json and results.md.

    Those that measure speed come first, one by one; the others run side by side.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=main.__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to try the checks")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the results (default: gpu)")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of packages that the machine lacks")
    parser.add_argument("--only", default="", help="numbers of checks, as 3,4; all by default")
    parser.add_argument("--seconds", type=float, default=470, help="what does not fit is ended (default: 470)")
    options, began = parser.parse_args(arguments), time.monotonic()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Whatever a check that was ended has left open there: the results are written by then.
    with tempfile.TemporaryDirectory(prefix="arcface_kd_gpu_", ignore_cleanup_errors=True) as scratch:
        make_importable(Path(scratch) / "site", options.wheels)
        lacking = missing()
        if lacking:
            print(f"missing: {', '.join(lacking)}\n{NEEDED}", file=sys.stderr)
            return 2
        return _run(options, Path(scratch), began)


def _run(options: argparse.Namespace, scratch: Path, began: float) -> int:
    # Only now can torch and the package be imported.
    import torch

    from arcface_kd.errors import ConfigError
    from arcface_kd.host.checkout import find_checkout
    from benchmarks.gpu.checks import CHECKS, Check, Place
    from benchmarks.gpu.page import page
    from benchmarks.gpu.processes import run_check

    host = os.environ.get("ARCFACE_TORCH")
    try:
        checkout = find_checkout(host) if host else None
    except ConfigError as error:
        print(f"ARCFACE_TORCH={host}: {error}", file=sys.stderr)
        return 2
    place = Place(
        device=torch.device(options.device),
        tiny=options.device == "cpu",
        scratch=scratch,
        host=checkout.resolve() if checkout else None,
    )
    if checkout is None:
        print("ARCFACE_TORCH is not set: no run of arcface_torch's trainer, no time of its head")
    wanted = {int(number) for number in options.only.split(",") if number}
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[dict[str, Any]] = []

    def run(check: Check) -> dict[str, Any]:
        left = options.seconds - (time.monotonic() - began)
        # A CPU may be a busy one, and nobody has lent it.
        return run_check(check, place, 10.0 * check.seconds if place.tiny else max(1.0, min(check.seconds, left)))

    def note(outcome: dict[str, Any]) -> None:
        outcomes.append(outcome)
        print(
            f"{outcome['number']:3} {outcome['status']:9} {outcome['seconds']:6.1f} s  {outcome['title']}", flush=True
        )
        for fault in outcome["faults"]:
            print(f"      {fault.splitlines()[0] if fault else ''}", flush=True)
        # After each one: whoever stops this has what there is.
        for log in scratch.glob("*.log"):
            shutil.copy(log, options.out)
        about = _about(options.device, time.monotonic() - began, outcomes)
        in_order = sorted(outcomes, key=lambda each: int(each["number"]))
        (options.out / "results.json").write_text(json.dumps({**about, "checks": in_order}, indent=1), encoding="utf-8")
        (options.out / "results.md").write_text(page(about, in_order), encoding="utf-8")

    chosen = [check for check in CHECKS if not wanted or check.number in wanted]
    for check in chosen:
        if check.alone:
            note(run(check))
    # Their processes share the cores: with as many threads each they would stand in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    with ThreadPoolExecutor(1 if place.tiny else len(CHECKS)) as side_by_side:
        for future in as_completed(side_by_side.submit(run, check) for check in chosen if not check.alone):
            note(future.result())
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
