"""The pictures of a comparison report: drawn once, in colours for a light page and for a dark one."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arcface_kd.errors import ConfigError
from arcface_kd.evaluation.report.scalars import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by people with any kind of colour vision (Okabe, Ito), and in grey by their line styles; the dark page has
# lighter ones.
_COLOURS = {
    "#0072b2": "#6cb8e6",
    "#d55e00": "#f0904a",
    "#009e73": "#35c79d",
    "#b0559a": "#e0a0cd",
    "#8a6d00": "#d9c04d",
    "#555555": "#bbbbbb",
}
_STYLES = ("-", "--", "-.", ":")
_INK, _PAPER, _GRID = "#1c1c1e", "#fefefe", "#d8d8dc"
_DARK = {**_COLOURS, _INK: "#e6e6ea", _PAPER: "#17181c", _GRID: "#3a3b42"}

# Inches at 72 to one, so that a phone 375 pixels wide shows 9 point letters at about their size.
_WIDTH, _HEIGHT = 4.4, 3.1
_POINTS = 400
_BINS = 60


@dataclass(frozen=True)
class Picture:
    """One picture as the page holds it: data URIs for a light and a dark page, sizes in CSS pixels."""

    title: str
    description: str
    light: str
    dark: str
    width: int
    height: int


def require_matplotlib() -> None:
    """Say early that pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install matplotlib") from None


@contextmanager
def _drawing(rows: int = 1, height: float = _HEIGHT) -> Iterator[tuple["Figure", "list[Axes]"]]:
    """A figure with axes under each other in the report's colours."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.hashsalt": "arcface_kd",
        "font.size": 9,
        "axes.titlesize": 9,
        "legend.fontsize": 8,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.facecolor": _PAPER,
        "figure.facecolor": _PAPER,
        "legend.facecolor": _PAPER,
        "legend.edgecolor": _GRID,
        "legend.framealpha": 0.8,
        "grid.color": _GRID,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, list(np.atleast_1d(figure.subplots(rows, 1, sharex=True)))


def _picture(figure: "Figure", title: str, description: str) -> Picture:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    light = stream.getvalue()
    dark = light
    for colour, other in _DARK.items():
        dark = dark.replace(colour.encode(), other.encode())
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    kind = "image/svg+xml"
    return Picture(title, description, data_uri(light, kind), data_uri(dark, kind), width, height)


def data_uri(content: bytes, kind: str) -> str:
    """A file as a page holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _look(number: int) -> dict[str, Any]:
    colours = list(_COLOURS)
    return {"color": colours[number % len(colours)], "linestyle": _STYLES[number % len(_STYLES)]}


def _thinned(curve: Curve) -> Curve:
    """At most ``_POINTS`` points, each the mean of its neighbours: a long run's file would outgrow the page."""
    size = -(-len(curve.x) // _POINTS)
    if size <= 1:
        return curve
    starts = np.arange(0, len(curve.x), size)
    counts = np.diff(np.append(starts, len(curve.x)))
    return Curve(np.add.reduceat(curve.x, starts) / counts, np.add.reduceat(curve.y, starts) / counts)


def _thinned_steps(curve: Curve) -> Curve:
    """The points of a step curve that lie apart on a logarithmic axis."""
    place = np.round(np.log10(curve.x) * 100) + np.round(curve.y * 500) / 1000
    kept = np.append(np.diff(place) != 0, True)
    return Curve(curve.x[kept], curve.y[kept])


def draw_roc(name: str, curves: Mapping[str, Curve]) -> Picture:
    """True accept rate over false accept rate, the latter logarithmic."""
    with _drawing() as (figure, (axes,)):
        smallest, lowest = 1.0, 1.0
        for number, (model, curve) in enumerate(curves.items()):
            shown = _thinned_steps(Curve(curve.x[curve.x > 0], curve.y[curve.x > 0]))
            axes.step(shown.x, shown.y, where="post", label=model, **_look(number))
            smallest, lowest = min(smallest, shown.x[0]), min(lowest, shown.y[0])
        axes.set_xscale("log")
        axes.set_xlim(smallest, 1.0)
        axes.set_ylim(max(0.0, lowest - 0.02), 1.005)
        axes.set_xlabel("false accept rate")
        axes.set_ylabel("true accept rate")
        axes.legend(loc="lower right")
        words = f"ROC curves of {', '.join(curves)} on {name}: true accept rate over false accept rate, logarithmic."
        return _picture(figure, f"ROC, {name}", words)


def draw_histograms(name: str, similarities: Mapping[str, NDArray[np.float64]], is_same: NDArray[np.bool_]) -> Picture:
    """How similar genuine and impostor pairs look to each model."""
    lowest = min(float(values.min()) for values in similarities.values())
    bins = np.linspace(min(lowest, 0.0), 1.0, _BINS + 1).tolist()
    with _drawing(len(similarities), 0.8 + 1.2 * len(similarities)) as (figure, rows):
        genuine, impostor, *_ = _COLOURS
        for axes, (model, values) in zip(rows, similarities.items(), strict=True):
            axes.hist(values[~is_same], bins, density=True, color=impostor, alpha=0.65, label="impostor")
            axes.hist(values[is_same], bins, density=True, color=genuine, alpha=0.65, label="genuine")
            axes.set_title(model)
            axes.set_yticks([])
        rows[0].legend(loc="upper right")
        rows[-1].set_xlabel("cosine similarity")
        words = f"Histograms of the cosine similarity of genuine and impostor pairs of {name}, one for each model."
        return _picture(figure, f"Genuine and impostor pairs, {name}", words)


def draw_curves(
    title: str,
    curves: Mapping[str, Curve],
    *,
    y: str,
    among: Sequence[str] | None = None,
    limits: tuple[float, float] | None = None,
    band: tuple[Curve, Curve] | None = None,
) -> Picture:
    """Values over training steps, inside the band that two others, over the same steps, bound.

    ``among`` are all names that have colours, so that one looks alike in pictures where others are missing.
    """
    with _drawing() as (figure, (axes,)):
        if band is not None:
            low, high = _thinned(band[0]), _thinned(band[1])
            colour = next(iter(_COLOURS))
            axes.fill_between(low.x, low.y, high.y, color=colour, alpha=0.2, linewidth=0, label="10 to 90 %")
        coloured = list(curves if among is None else among)
        for name, curve in curves.items():
            shown = _thinned(curve)
            axes.plot(shown.x, shown.y, label=name, linewidth=1.2, **_look(coloured.index(name)))
        axes.set_xlabel("step")
        axes.set_ylabel(y)
        if limits is not None:
            axes.set_ylim(*limits)
        axes.legend()
        around = "" if band is None else ", with the band of 10 to 90 percent"
        return _picture(figure, title, f"{title}: {y} over training steps, of {', '.join(curves)}{around}.")
