"""Pictures from rows: what there are rows for is drawn, and nothing else."""

from pathlib import Path

from benchmarks.plots import draw
from benchmarks.record import Row


def _row(benchmark: str, provider: str, size: str, metric: str, value: float) -> Row:
    return Row(benchmark, provider, size, metric, value, "cpu", "2", "c")


def test_nothing_is_drawn_without_rows(tmp_path: Path) -> None:
    assert draw([], tmp_path / "png") == []
    assert not (tmp_path / "png").exists()


def test_each_picture_needs_its_own_rows_only(tmp_path: Path) -> None:
    size = "C=100 B=2 D=4"
    assert draw([_row("head", "floor", size, "seconds", 1.0)], tmp_path) == [tmp_path / "head_time.png"]
    assert draw([_row("head", "arcface_kd", size, "seconds", 1.0)], tmp_path) == []
    assert draw([_row("head", "arcface_kd", size, "peak_mb", 1.0)], tmp_path) == [tmp_path / "head_memory.png"]
    cost = [_row("head_cost", "arcface_kd", f"C={c} B=2 D=4", "seconds", c * 1e-6) for c in (100, 1000)]
    assert draw(cost, tmp_path) == [tmp_path / "head_cost.png"]
    learned = [_row("learned", name, size, "seconds", 1.0) for name in ("arcface_kd", "arcface_torch")]
    assert draw(learned, tmp_path) == [tmp_path / "learned_time.png"]
