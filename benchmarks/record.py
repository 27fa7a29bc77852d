"""Results as rows of a CSV file that only ever grows, and as a table on the screen."""

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.csv"


@dataclass(frozen=True)
class Row:
    """One measured or computed number.

    Attributes:
        benchmark: the module that measured it.
        provider: whose it is: ours, a reference's, the host's.
        size: classes C on the rank, rows B of the gathered batch, dimension D, as :func:`size` writes them.
        metric: ``seconds`` (median of the rounds), ``peak_mb`` (measured), or a computed quantity with its unit.
        value: the number.
        device: ``cpu`` with the number of threads, or the GPU's name.
        torch: torch's version.
        commit: the commit that was measured; ``+`` behind it where files of the package or the benchmarks differed.
    """

    benchmark: str
    provider: str
    size: str
    metric: str
    value: float
    device: str
    torch: str
    commit: str


class Recorder:
    """Collects the rows of one benchmark, with where and on what they were measured.

    Args:
        benchmark: its name.
        device: where it runs.
    """

    def __init__(self, benchmark: str, device: torch.device) -> None:
        self.benchmark = benchmark
        self.rows: list[Row] = []
        self._device = _name_of(device)
        self._commit = commit()

    def add(self, provider: str, size: str, metric: str, value: float) -> None:
        """Keep one number."""
        self.rows.append(
            Row(self.benchmark, provider, size, metric, value, self._device, str(torch.__version__), self._commit)
        )


def size(classes: int, batch: int, dimension: int) -> str:
    """How a row names its size."""
    return f"C={classes} B={batch} D={dimension}"


def classes_of(size: str) -> int:
    """The number of classes in a row's size."""
    return int(size.split()[0].removeprefix("C="))


def append(path: Path, rows: Iterable[Any], kind: type[Any] = Row) -> None:
    """Append rows, dataclasses of one kind, to a CSV file; a new file begins with the header."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if new:
            writer.writerow(field.name for field in fields(kind))
        for row in rows:
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in astuple(row)])


def read(path: Path, kind: type[Any] = Row) -> list[Any]:
    """All rows of a CSV file, the oldest first.

    Raises:
        ValueError: the file has other columns.
    """
    types = get_type_hints(kind)
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames != list(types):
            raise ValueError(f"{path} has the columns {reader.fieldnames}; {list(types)} are wanted")
        return [kind(**{name: types[name](text) for name, text in line.items()}) for line in reader]


def latest(rows: Iterable[Row], benchmark: str) -> dict[tuple[str, str, str], float]:
    """The newest value of each (provider, size, metric) of a benchmark."""
    return {(row.provider, row.size, row.metric): row.value for row in rows if row.benchmark == benchmark}


def print_table(title: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Print columns: the first flush left, the others flush right."""
    table = [list(header), *(list(line) for line in lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    print(f"\n{title}")
    for number, line in enumerate(table):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())
        if number == 0:
            print("  " + "  ".join("-" * width for width in widths))


def print_verdict(claim: str, met: str, held: bool) -> None:
    """Print whether a claim held in this run."""
    print(f"  {'held  ' if held else 'MISSED'}  {claim}: {met}")


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.get_num_threads()} threads"


def commit() -> str:
    """The checked-out commit, "unknown" outside a git checkout."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        changed = git("status", "--porcelain", "--", "arcface_kd", "benchmarks", ":!benchmarks/results.csv")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+" if changed else commit
