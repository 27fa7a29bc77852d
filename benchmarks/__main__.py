"""The command behind ``make bench``."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import plots, record

# Each is a module of this package with `run(sizes, device) -> rows`, default `Sizes()` and `TINY` ones.
BENCHMARKS = ("head", "learned", "gkd", "scale", "cache", "methods", "tcs", "loader", "denormals", "verification")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks asked for, append their rows, draw the pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("only", nargs="?", choices=BENCHMARKS, help="one of them; all by default")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that it runs and nothing about speed")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="the CSV file that rows are appended to")
    parser.add_argument("--pictures", type=Path, default=plots.PICTURES, help="the folder of the pictures")
    options = parser.parse_args(arguments)
    if options.tiny and (options.results == record.RESULTS or options.pictures == plots.PICTURES):
        parser.error("--tiny would mix numbers that mean nothing with the others: give --results and --pictures too")
    torch.set_num_threads(options.threads)
    for name in BENCHMARKS if options.only is None else (options.only,):
        benchmark = importlib.import_module(f"benchmarks.{name}")
        record.append(
            options.results, benchmark.run(benchmark.TINY if options.tiny else benchmark.Sizes(), options.device)
        )
    for path in plots.draw(record.read(options.results), options.pictures):
        print(f"drawn: {path}")


if __name__ == "__main__":
    main()
