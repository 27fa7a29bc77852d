"""Pictures of runs: ROC with a logarithmic FAR axis, training curves, alpha over time."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from arcface_kd.errors import ConfigError
from arcface_kd.evaluation.report.scalars import Curve
from arcface_kd.system.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by people with any kind of colour vision, and in grey by their line styles.
_STYLES = (("#0072b2", "-"), ("#d55e00", "--"), ("#009e73", "-."), ("#cc79a7", ":"), ("#555555", "-"))


@contextmanager
def _picture(path: str | os.PathLike[str], title: str, x: str, y: str) -> Iterator["Axes"]:
    """Axes to draw on; saved to ``path`` as PNG afterwards, without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('pictures need matplotlib: pip install "arcface_kd[report]"') from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    yield axes
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=120)


def plot_roc(path: str | os.PathLike[str], curves: Mapping[str, Curve], title: str) -> None:
    """True accept rate over false accept rate, the latter logarithmic.

    Args:
        path: PNG file to write.
        curves: (FAR, TAR) by model.
        title: usually the verification set's name.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    with _picture(path, f"ROC, {title}", "false accept rate", "true accept rate") as axes:
        axes.set_xscale("log")
        smallest = 1.0
        for (model, curve), (colour, style) in zip(curves.items(), _STYLES, strict=False):
            shown = curve.x > 0
            axes.step(curve.x[shown], curve.y[shown], where="post", label=model, color=colour, linestyle=style)
            smallest = min(smallest, *curve.x[shown])
        axes.set_xlim(smallest, 1.0)


def plot_training(path: str | os.PathLike[str], curves: Mapping[str, Curve]) -> None:
    """Training losses over steps.

    Args:
        path: PNG file to write.
        curves: (step, loss) by model.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    with _picture(path, "training", "step", "loss") as axes:
        for (model, curve), (colour, style) in zip(curves.items(), _STYLES, strict=False):
            axes.plot(curve.x, curve.y, label=model, color=colour, linestyle=style)


def plot_alpha(path: str | os.PathLike[str], curves: Mapping[str, Curve]) -> None:
    """AdaDistill's alpha over steps: how much of a class center stays.

    Args:
        path: PNG file to write.
        curves: (step, value) by tag, such as ``kd/alpha_mean`` and ``kd/alpha_q10``.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    with _picture(path, "alpha: share of the old class center that stays", "step", "alpha") as axes:
        for (tag, curve), (colour, style) in zip(curves.items(), _STYLES, strict=False):
            axes.plot(curve.x, curve.y, label=tag.rpartition("/")[2], color=colour, linestyle=style)
        axes.set_ylim(0, 1)
