"""Tables of scores, for a terminal and for the report."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from arcface_kd.evaluation.scoring import Score

_TITLES = {
    "pairs": "verification of pairs, ten folds, in %",
    "groups": "groups of verification sets, accuracy in %",
    "1:1": "verification of templates, in %",
    "1:N": "identification of templates, in %",
    "tinyface": "identification of low-resolution faces, in %",
    "cost": "one image alone: .onnx files by onnxruntime on the CPU, others by torch",
}
_PLAIN = ("p50_ms", "p95_ms", "worst_over_best_error")


class ScoreTable(NamedTuple):
    """The scores of one protocol."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def heading(name: str) -> str:
    """A number's name on top of its column: ``TAR@FAR=1e-3`` of JSON's ``tar@far=1e-3``."""
    rate, at, point = name.partition("@")
    if at:
        kind, _, level = point.partition("=")
        return f"{rate.upper()}@{kind.upper()}={level}"
    return name.upper() if name in ("auc", "eer") else name.replace("_", " ")


def _cell(name: str, numbers: Mapping[str, int | float | None]) -> str:
    value = numbers[name]
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if name in _PLAIN:
        return f"{value:.2f}"
    deviation = numbers.get(f"{name}_std")
    return f"{100 * value:.3f}" if deviation is None else f"{100 * value:.3f} +- {100 * deviation:.3f}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of a table in columns, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(map(str.rstrip, rows))


def score_tables(scores: "Sequence[Score]") -> list[ScoreTable]:
    """Scores as tables, one for each protocol.

    A column that no set is large enough for is left out, as are those of low resolution and of galleries where there
    are none, and that of the inputs where all are the same.
    """
    several_inputs = len({one.input for one in scores}) > 1
    tables = []
    for protocol, title in _TITLES.items():
        chosen = [one for one in scores if one.protocol == protocol]
        if not chosen:
            continue
        names = [
            name
            for name in chosen[0].numbers
            if not name.endswith("_std") and any(one.numbers[name] is not None for one in chosen)
        ]
        columns = {
            "set": [one.set for one in chosen],
            "low resolution": [one.low_res for one in chosen],
            "model": [one.model for one in chosen],
            "gallery": [one.gallery for one in chosen],
            **{heading(name): [_cell(name, one.numbers) for one in chosen] for name in names},
            "input": [one.input for one in chosen] if several_inputs else [],
        }
        columns = {head: cells for head, cells in columns.items() if any(cells)}
        tables.append(ScoreTable(title, list(columns), [list(row) for row in zip(*columns.values(), strict=True)]))
    return tables


def table(scores: "Sequence[Score]") -> str:
    """Scores for a terminal, a block of aligned lines for each protocol."""
    return "\n\n".join(f"{found.title}\n{aligned([found.heads, *found.rows])}" for found in score_tables(scores))
