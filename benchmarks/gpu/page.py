"""The results as a page."""

from collections.abc import Mapping, Sequence
from typing import Any


def page(run: Mapping[str, Any], outcomes: Sequence[Mapping[str, Any]]) -> str:
    """The page of a run, in markdown.

    Args:
        run: what was run on: ``device``, ``commit``, ``date``, ``seconds``.
        outcomes: of the checks, as :func:`benchmarks.gpu.processes.run_check` gives them.
    """
    lines = [f"# Checks on {run['device']}", ""]
    lines += [f"Commit {run['commit']}, {run['date']}, {run['seconds']:.0f} s. Written by `make gpu`."]
    if run["tiny"]:
        lines += ["", "Tiny sizes: they show that the checks run, and nothing about a GPU."]
    lines += ["", "| check | | result | s |", "|---:|---|---|---:|"]
    lines += [f"| {each['number']} | {each['title']} | {_result(each)} | {each['seconds']:.0f} |" for each in outcomes]
    for each in outcomes:
        lines += ["", f"## {each['number']}. {each['title']}", "", f"{_result(each).capitalize()}."]
        lines += [f"- {'met' if met else 'MISSED'}: {claim}" for claim, met in each["goals"].items()]
        if each["faults"]:
            lines += ["", "```", *each["faults"], "```"]
        if each["numbers"]:
            lines += ["", "| | |", "|---|---:|"]
            lines += [f"| {name} | {_cell(value)} |" for name, value in each["numbers"].items()]
    return "\n".join([*lines, ""])


def _result(outcome: Mapping[str, Any]) -> str:
    missed = sum(not met for met in outcome["goals"].values())
    return str(outcome["status"] + (f", {missed} of {len(outcome['goals'])} goals missed" if missed else ""))


def _cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")
