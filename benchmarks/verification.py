"""Scoring verification pairs: accuracy of ten folds, and everything else that the protocol tells.

Embeddings are given; neither decoding nor the network is in the seconds.

Providers:
    arcface_kd: :mod:`arcface_kd.evaluation.verification`.
    insightface: ``eval/verification.py`` of the checkout that ARCFACE_TORCH names, with its ``interp1d``, which today's
        scipy refuses for its repeated values, replaced by ``np.interp``.
    loops: the naive twin of the tests, where there is no checkout; its accuracy alone.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from arcface_kd.evaluation.embedding import normalize
from arcface_kd.evaluation.verification import pair_distances, ten_fold_accuracy, verify
from benchmarks.record import Recorder, Row, print_table, print_verdict
from benchmarks.timing import interleaved_seconds
from tests.reference import ten_fold

LEAST_SPEED_UP = 20.0
_THRESHOLDS = np.arange(0, 4, 0.01)


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        pairs: P; LFW has 6,000.
        dimension: D.
        rounds: rounds that count.
        looped_pairs: P where the naive loops stand in for InsightFace.
    """

    pairs: int = 6000
    dimension: int = 512
    rounds: int = 5
    looped_pairs: int = 600


TINY = Sizes(pairs=40, dimension=8, rounds=1, looped_pairs=20)


def host_verification(folder: Path) -> ModuleType:
    """InsightFace's own module, with mxnet, which it needs for reading images only, left out.

    Args:
        folder: ``arcface_torch``; nothing is written to it.
    """
    mxnet = ModuleType("mxnet")
    mxnet.ndarray = ModuleType("mxnet.ndarray")  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("host_verification", folder / "eval" / "verification.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, writes = sys.modules.get("mxnet"), sys.dont_write_bytecode
    sys.modules["mxnet"], sys.dont_write_bytecode = mxnet, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
        if before is None:
            del sys.modules["mxnet"]
        else:
            sys.modules["mxnet"] = before
    module.interpolate = SimpleNamespace(  # type: ignore[attr-defined]
        interp1d=lambda x, y, kind: lambda at: np.interp(at, x, y)
    )
    return module


def some_pairs(count: int, dimension: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Normalised embeddings (2P, D), float64, and kinds (P,), in alternating blocks as LFW's, with errors to make."""
    random = np.random.default_rng(0)
    is_same = np.arange(count) // max(1, count // 20) % 2 == 0
    first, stranger, noise = random.normal(size=(3, count, dimension))
    second = np.where(is_same[:, None], first, stranger) + 3 * noise
    return normalize(np.stack([first, second], axis=1).reshape(2 * count, dimension)), is_same


def run(sizes: Sizes, device: torch.device) -> list[Row]:
    """Measure, print the table and the verdicts.

    Args:
        sizes: what to measure.
        device: without effect; scoring is numpy's.

    Returns:
        The rows.
    """
    recorder = Recorder("verification", torch.device("cpu"))
    folder = os.environ.get("ARCFACE_TORCH")
    host = None if folder is None else host_verification(Path(folder))
    other, count = ("loops", sizes.looped_pairs) if host is None else ("insightface", sizes.pairs)
    embeddings, is_same = some_pairs(count, sizes.dimension)
    where = f"P={count} D={sizes.dimension}"
    tasks: dict[str, dict[str, Callable[[], Any]]] = {
        "accuracy": {"arcface_kd": lambda: ten_fold_accuracy(pair_distances(embeddings), is_same)[0]}
    }
    if host is None:
        print("  ARCFACE_TORCH is not set: the tests' loops stand in for InsightFace, on fewer pairs")
        tasks["accuracy"][other] = lambda: ten_fold.ten_fold_accuracy(pair_distances(embeddings), is_same)[0]
    else:
        first, second = embeddings[0::2], embeddings[1::2]
        tasks["accuracy"][other] = lambda: host.calculate_roc(_THRESHOLDS, first, second, is_same)[2]
        tasks["whole protocol"] = {
            "arcface_kd": lambda: verify(embeddings, is_same),
            other: lambda: host.evaluate(embeddings, is_same),
        }
    lines, speed_ups = [], {}
    for task, providers in tasks.items():
        seconds = interleaved_seconds(providers, sizes.rounds, torch.device("cpu"))
        for provider, value in seconds.items():
            recorder.add(f"{provider}, {task}", where, "seconds", value)
            lines.append((f"{task}, {provider}", f"{1000 * value:.2f}"))
        speed_ups[task] = seconds[other] / seconds["arcface_kd"]
        recorder.add(f"arcface_kd, {task}", where, f"speed_over_{other}", speed_ups[task])
    print_table(f"Scoring pairs, {where}", ("what, by whom", "ms"), lines)
    for task, speed_up in speed_ups.items():
        claim = f"{task}: at least {LEAST_SPEED_UP:.0f} times as fast as {other}"
        print_verdict(claim, f"{speed_up:.1f} times", speed_up >= LEAST_SPEED_UP)
    ours, theirs = (np.asarray(call()).tolist() for call in tasks["accuracy"].values())
    claim = f"accuracies of the folds equal those of {other} to the last bit"
    print_verdict(claim, "equal" if ours == theirs else "different", ours == theirs)
    return recorder.rows
