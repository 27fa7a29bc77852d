"""The README's pictures, drawn from the newest rows of the CSV file."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from arcface_kd.system.files import atomic_write
from benchmarks.record import ROOT, Row, classes_of, latest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES = ROOT / "docs" / "benchmarks"

# Told apart by people with any kind of colour vision.
_COLOURS = {"arcface_kd": "#0072b2", "floor": "#999999"}
_OTHER = "#d55e00"


@contextmanager
def _picture(path: Path, title: str, height: float = 3.6) -> Iterator["Axes"]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    yield axes
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=120)


def _colour(provider: str) -> str:
    return _COLOURS.get(provider.removesuffix("_bf16").removesuffix("_fp16"), _OTHER)


def _bars(axes: "Axes", values: dict[str, float], unit: str) -> None:
    bars = axes.barh(list(values), list(values.values()), color=[_colour(name) for name in values])
    axes.bar_label(bars, [f"{value:.2f}{unit}" for value in values.values()], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)


def _seconds_of_largest(rows: Sequence[Row], benchmark: str) -> tuple[str, dict[str, float]]:
    """The largest size with times, and the seconds of each provider there."""
    times = {key: value for key, value in latest(rows, benchmark).items() if key[2] == "seconds"}
    if not times:
        return "", {}
    largest = max((key[1] for key in times), key=classes_of)
    return largest, {key[0]: value for key, value in times.items() if key[1] == largest}


def draw_head_time(rows: Sequence[Row], folder: Path) -> Path | None:
    """Bars: a step's time in units of the floor's."""
    where, seconds = _seconds_of_largest(rows, "head")
    if "floor" not in seconds:
        return None
    path = folder / "head_time.png"
    with _picture(path, f"Head with frozen centers, forward + backward, {where}", 2.8) as axes:
        ordered = sorted(seconds, key=lambda name: seconds[name])
        _bars(axes, {name: seconds[name] / seconds["floor"] for name in ordered}, "")
        axes.axvline(1, color="#999999", linestyle="--", linewidth=1)
        axes.set_xlabel("time / time of the two matrix products (floor)")
    return path


def draw_head_cost(rows: Sequence[Row], folder: Path) -> Path | None:
    """Log-log: a step's time over the number of classes, with a line of slope 1."""
    points = sorted(
        (classes_of(where), value)
        for (_, where, metric), value in latest(rows, "head_cost").items()
        if metric == "seconds"
    )
    if not points:
        return None
    path = folder / "head_cost.png"
    with _picture(path, "Head with frozen centers: a step's time over the number of classes") as axes:
        classes, seconds = zip(*points, strict=True)
        axes.loglog(classes, seconds, "o-", color=_COLOURS["arcface_kd"], label="arcface_kd")
        line = [seconds[-1] * c / classes[-1] for c in classes]
        axes.loglog(classes, line, "--", color="#999999", label="slope 1")
        axes.set_xlabel("classes")
        axes.set_ylabel("seconds")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    return path


def draw_head_memory(rows: Sequence[Row], folder: Path) -> Path | None:
    """Peak memory of a step above the centers, over the number of classes."""
    peaks: dict[str, list[tuple[int, float]]] = {}
    for (provider, where, metric), value in latest(rows, "head").items():
        if metric == "peak_mb":
            peaks.setdefault(provider, []).append((classes_of(where), value))
    if not peaks:
        return None
    path = folder / "head_memory.png"
    with _picture(path, "Head with frozen centers: peak memory of a step above the centers") as axes:
        for provider, points in peaks.items():
            classes, values = zip(*sorted(points), strict=True)
            axes.loglog(classes, values, "o-", color=_colour(provider), label=provider)
        axes.set_ylim(bottom=1)
        axes.set_xlabel("classes")
        axes.set_ylabel("MB")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    return path


def draw_curves(points: Mapping[str, Mapping[int, float]], folder: Path) -> Path:
    """Lines: the accuracy of each student, percent, over the epochs of its run."""
    from matplotlib import color_sequences

    path = folder / "curves.png"
    with _picture(path, "Accuracy over epochs", 4.2) as axes:
        axes.set_prop_cycle(color=color_sequences["tab20"])
        for name, accuracies in points.items():
            axes.plot(*zip(*sorted(accuracies.items()), strict=True), "o-", label=name)
        epochs = sorted({length for accuracies in points.values() for length in accuracies})
        axes.set_xscale("log")
        axes.set_xticks(epochs, [str(length) for length in epochs])
        axes.minorticks_off()
        axes.set_xlabel("epochs")
        axes.set_ylabel("accuracy, percent")
        axes.grid(alpha=0.3)
        # Beside the lines, which fill the picture.
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small", frameon=False)
    return path


def draw_learned_time(rows: Sequence[Row], folder: Path) -> Path | None:
    """Bars: the learned classifier's time in units of the host's head (or of its dense twin)."""
    where, seconds = _seconds_of_largest(rows, "learned")
    other = "arcface_torch" if "arcface_torch" in seconds else "dense_twin"
    if other not in seconds:
        return None
    path = folder / "learned_time.png"
    with _picture(path, f"Learned classifier, forward + backward, {where}", 2.2) as axes:
        _bars(axes, {name: seconds[name] / seconds[other] for name in ("arcface_kd", other)}, "")
        axes.set_xlabel(f"time / time of {other}")
    return path


def draw_scale(rows: Sequence[Row], folder: Path) -> Path | None:
    """Bars: memory that a rank needs, and bytes that it sends a step, computed."""
    values = latest(rows, "scale")
    worlds = sorted(
        {where for _, where, metric in values if metric == "sent_mb"}, key=lambda where: int(where.split("N=")[1])
    )
    if not worlds:
        return None
    path = folder / "scale.png"
    memory: dict[str, float] = {}
    sent: dict[str, float] = {}
    for where in worlds:
        for provider in ("arcface_kd", "partial_fc", "published_adadistill"):
            if (provider, where, "sent_mb") in values:
                name = f"{provider}, {where.split('N=')[1]} GPUs"
                memory[name] = values[provider, where, "state_mb"] + values[provider, where, "working_mb"]
                sent[name] = values[provider, where, "sent_mb"]
    with _picture(path, "One GPU's share of a step, computed", 4.2) as axes:
        places = range(len(memory))
        for shift, (label, data, colour) in enumerate(
            (("memory of the head, MB", memory, "#0072b2"), ("sent, MB", sent, "#d55e00"))
        ):
            bars = axes.barh([p + 0.4 * shift for p in places], list(data.values()), 0.38, label=label, color=colour)
            axes.bar_label(bars, [f"{value:,.0f}" for value in data.values()], padding=3)
        axes.set_yticks([p + 0.2 for p in places], list(memory))
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.legend(loc="lower right")
    return path


def draw(rows: Sequence[Row], folder: Path = PICTURES) -> list[Path]:
    """Draw every picture for which there are rows.

    Args:
        rows: of the CSV file, the oldest first.
        folder: where the PNG files go; made when missing.

    Returns:
        The files written.
    """
    pictures = (draw_head_time, draw_head_cost, draw_head_memory, draw_learned_time, draw_scale)
    return [path for path in (picture(rows, folder) for picture in pictures) if path is not None]
