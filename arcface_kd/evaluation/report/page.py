"""The comparison as one page: ``report.html``, which holds everything it shows, and ``report.md`` with its tables."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.errors import ConfigError
from arcface_kd.evaluation.report.comparison import ComparedSet, Comparison, Contestant, Score
from arcface_kd.evaluation.report.cost import BATCH_SIZE
from arcface_kd.evaluation.report.pictures import Picture, data_uri, draw_curves, draw_histograms, draw_roc
from arcface_kd.evaluation.report.run_folder import RunFolder
from arcface_kd.evaluation.report.scalars import Curve
from arcface_kd.evaluation.score_table import heading, score_tables
from arcface_kd.system.files import atomic_write

if TYPE_CHECKING:
    from jinja2 import Template

_SIDE = 112
_JPEG_QUALITY = 90
_ALPHA = "kd/alpha_"
_DRIFT = "kd/center_drift"
_SHARES = "kd/gradient_share/"


@dataclass(frozen=True)
class Cell:
    """One field of a table: a number, what stands below it, and whether it is marked."""

    text: str
    detail: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class FacePair:
    """One pair of the hardest: both faces beside each other as a data URI."""

    image: str
    caption: str
    description: str


@dataclass(frozen=True)
class Part:
    """Something under a heading, which may be empty; notes stand below the table."""

    title: str = ""
    table: Table | None = None
    notes: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    faces: Sequence[FacePair] = ()


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    title: str
    parts: list[Part] = field(default_factory=list)


def write_report(comparison: Comparison, out: Path, *, faces: bool = True) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md``; without ``faces``, the hardest pairs stand there by number."""
    sections = _sections(comparison, faces)
    title = f"{len(comparison.contestants)} models compared"
    sets = dict.fromkeys(compared.pairs.name for compared in comparison.sets)
    sets |= dict.fromkeys(score.set for score in comparison.scores)
    subtitle = (
        f"{', '.join(contestant.name for contestant in comparison.contestants)}. Judged on "
        f"{', '.join(sets)}. Percent everywhere; below a number, its "
        f"95 % interval from {comparison.replicates:,} bootstrap replicates. The best student of a column is marked; "
        "≈ stands where the interval of the difference to it holds 0, so that these pairs do not tell the two apart."
    )
    page = _template().render(title=title, subtitle=subtitle, sections=sections)
    out.mkdir(parents=True, exist_ok=True)
    written = out / "report.html", out / "report.md"
    for path, text in zip(written, (page + "\n", _markdown(title, subtitle, sections)), strict=True):
        with atomic_write(path) as stream:
            stream.write(text.encode())
    return written


@cache
def _template() -> "Template":
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise ConfigError('the report needs jinja2: pip install "jinja2>=3.1.6"') from None
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("report.html")


def _sections(comparison: Comparison, faces: bool) -> list[Section]:
    sections = [Section("Verification", [_accuracy_overview(comparison)] if len(comparison.sets) > 1 else [])]
    for compared in comparison.sets:
        sections[0].parts.append(_set_part(compared))
        if compared.views:
            sections[0].parts.append(_views_part(compared))
    if comparison.scores:
        tables = [
            Part(found.title, Table(found.heads, [[Cell(text) for text in row] for row in found.rows]))
            for found in score_tables(comparison.scores)
        ]
        sections.append(Section("Groups and searches", tables))
    sections.append(Section("Cost", [_cost_part(comparison)]))
    if comparison.sets:
        sections.append(Section("ROC and similarities", [Part(pictures=_score_pictures(comparison))]))
    training = _training_parts(comparison.contestants)
    if training:
        sections.append(Section("Training", training))
    sections.append(Section("Hardest pairs", _hardest_parts(comparison, faces)))
    return [section for section in sections if section.parts]


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _cell(score: Score) -> Cell:
    if score.value is None or score.interval is None:
        return Cell("-")
    low, high = score.interval
    detail = f"{_percent(low)} to {_percent(high)}" if low == low else ""
    return Cell(_percent(score.value) + (" ≈" if score.close else ""), detail, score.best)


def _accuracy_overview(comparison: Comparison) -> Part:
    names = [contestant.name for contestant in comparison.contestants]
    means = {
        name: float(np.mean([compared.judgements[name].result.accuracy for compared in comparison.sets]))
        for name in names
    }
    best = max(means[name] for name in comparison.students)
    rows = []
    for name in names:
        cells = [_cell(compared.judgements[name].scores["accuracy"]) for compared in comparison.sets]
        is_best = name in comparison.students and means[name] == best
        rows.append([Cell(name), Cell(_percent(means[name]), best=is_best), *cells])
    heads = ["model", "mean", *(compared.pairs.name for compared in comparison.sets)]
    return Part("Accuracy on all sets", Table(heads, rows))


def _head(column: str) -> str:
    return heading(column) + (" (less is better)" if column == "eer" else "")


def _set_part(compared: ComparedSet) -> Part:
    columns = compared.columns
    rows = []
    for name, judgement in compared.judgements.items():
        cells = [_cell(judgement.scores[column]) for column in columns]
        rows.append([Cell(name), *cells, Cell(_percent(judgement.result.accuracy_std))])
    first = next(iter(compared.judgements.values())).result
    left_out = [_head(name) for name in first.as_row() if name.startswith("tar@") and name not in columns]
    notes = [
        f"{first.genuine_pairs:,} genuine, {first.impostor_pairs:,} impostor pairs. Resampled: {compared.resampled}.",
        "Accuracy is that of InsightFace's ten folds, whose thresholds stay as they are in each replicate.",
    ]
    if left_out:
        notes.append(f"Too few impostor pairs for {', '.join(left_out)}.")
    return Part(compared.pairs.name, Table(["model", *map(_head, columns), "std over folds"], rows), notes)


def _views_part(compared: ComparedSet) -> Part:
    heads = ["model", *compared.views]
    rows = [
        [Cell(name), *(_cell(accuracies[name]) for accuracies in compared.views.values())]
        for name in compared.judgements
    ]
    notes = [
        "Accuracy. Low resolution: scaled down by the mean of each area, and back by cubics; of one side, the second "
        "image of each pair."
    ]
    if any(view.startswith("gallery") for view in compared.views):
        notes.append("Gallery: its model embeds the first image of each pair, the model of the row the second.")
    return Part(f"{compared.pairs.name}: low resolution and galleries", Table(heads, rows), notes)


def _large(number: int | None) -> str:
    if number is None:
        return "-"
    for size, letter in ((10**9, "G"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:,}"


def _speed(images_per_second: float | None) -> str:
    if images_per_second is None:
        return "-"
    return f"{images_per_second:,.0f}" if images_per_second >= 10 else f"{images_per_second:.1f}"


def _cost_part(comparison: Comparison) -> Part:
    rows = []
    for contestant in comparison.contestants:
        found = comparison.costs[contestant.name]
        speed = contestant.run.training_speed if contestant.run is not None else None
        rows.append(
            [
                Cell(contestant.name),
                Cell(contestant.method),
                Cell(contestant.network),
                Cell("-" if found.parameters is None else f"{found.parameters:,}"),
                Cell(_large(found.multiply_adds)),
                Cell("-" if found.file_bytes is None else f"{found.file_bytes / 1e6:.1f} MB"),
                *([Cell("-")] * 2 if found.latency is None else [Cell(f"{one:.2f}") for one in found.latency]),
                Cell(_speed(found.images_per_second)),
                Cell(_speed(speed)),
            ]
        )
    heads = ["model", "method", "network", "parameters", "multiply-adds", "file", "ms/image p50", "p95"]
    heads += ["images/s", "images/s in training"]
    notes = [
        "ms/image: one image alone; .onnx files by onnxruntime on the CPU, others by torch. "
        f"images/s: one view of an image, batches of {BATCH_SIZE}, each model in its own number format, on "
        f"{comparison.machine}; the fastest of some passes, the models in turns. In training: as the run's own log has "
        "it, on the machine of the run. Multiply-adds: convolutions and matrix products of one image."
    ]
    return Part(table=Table(heads, rows), notes=notes)


def _score_pictures(comparison: Comparison) -> list[Picture]:
    pictures = []
    for compared in comparison.sets:
        name = compared.pairs.name
        results = {model: judgement.result for model, judgement in compared.judgements.items()}
        pictures.append(draw_roc(name, {model: Curve(found.fpr, found.tpr) for model, found in results.items()}))
        similarities = {model: judgement.similarities for model, judgement in compared.judgements.items()}
        pictures.append(draw_histograms(name, similarities, compared.pairs.is_same))
    return pictures


def _training_parts(contestants: Sequence[Contestant]) -> list[Part]:
    runs = [contestant.run for contestant in contestants if contestant.run is not None]
    parts = []

    def add(title: str, pictures: Sequence[Picture], *notes: str) -> None:
        if pictures:
            parts.append(Part(title, notes=notes, pictures=pictures))

    found = {run.name: run.loss_terms() for run in runs}
    among = [contestant.name for contestant in contestants]
    names = dict.fromkeys(term for terms in found.values() for term in terms)
    losses = []
    for term in names:
        curves = {run: terms[term] for run, terms in found.items() if term in terms}
        losses.append(draw_curves(f"loss term {term}", curves, y=term, among=among))
    total = {run.name: run.curves["loss"] for run in runs if "loss" in run.curves}
    if total and losses:
        losses.insert(0, draw_curves("loss, all terms together", total, y="loss", among=among))
    add("Loss terms", losses)
    shares = [
        draw_curves(f"gradient shares, {run.name}", family, y="share of the gradient norms", limits=(0, 1))
        for run in runs
        if len(family := run.family(_SHARES)) > 1
    ]
    note = "The share of each term in the gradient that reaches the embeddings: one near 0 has no say."
    add("Gradient shares", shares, note)
    adaptation = [_alpha_picture(run) for run in runs if f"{_ALPHA}mean" in run.curves]
    drifts = {run.name: run.curves[_DRIFT] for run in runs if _DRIFT in run.curves}
    if drifts:
        adaptation.append(draw_curves("center drift", drifts, y="1 - cosine of old and new", among=among))
    note = "Alpha: the share of an old class center that stays. Drift: how far a batch's centers turn in one step."
    add("Class centers", adaptation, note)
    silent = [run.name for run in runs if not run.curves]
    if silent:
        parts.append(Part(notes=[f"No curves: {', '.join(silent)} left no TensorBoard scalars."]))
    return parts


def _alpha_picture(run: RunFolder) -> Picture:
    found = run.family(_ALPHA)
    title = f"alpha, {run.name}"
    band = (found["q10"], found["q90"]) if {"q10", "q90"} <= found.keys() else None
    if band is not None:
        found = {name: found[key] for key, name in (("mean", "mean"), ("q50", "median")) if key in found}
    return draw_curves(title, found, y="alpha", limits=(0, 1), band=band)


def _hardest_parts(comparison: Comparison, faces: bool) -> list[Part]:
    parts = []
    for compared in comparison.sets:
        for model, judgement in compared.judgements.items():
            for genuine in (True, False):
                pairs = judgement.hardest(compared.pairs.is_same, genuine)
                kind = "genuine pairs that look least alike" if genuine else "impostor pairs that look most alike"
                title = f"{compared.pairs.name}, {model}: {kind}"
                captions = [f"pair {pair}, cosine {judgement.similarities[pair]:.3f}" for pair in pairs]
                if not faces:
                    parts.append(Part(title, notes=["; ".join(captions) + "."]))
                    continue
                shown = [
                    FacePair(_side_by_side(compared, pair), caption, f"{compared.pairs.name} {caption}, {kind[:-1]}")
                    for pair, caption in zip(pairs, captions, strict=True)
                ]
                parts.append(Part(title, faces=shown))
    return parts


def _side_by_side(compared: ComparedSet, pair: int) -> str:
    """The two faces of a pair as one JPEG."""
    import cv2

    faces = [decode_rgb(image) for image in compared.pairs.images[2 * pair : 2 * pair + 2]]
    sides = [cv2.resize(face, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA) for face in faces]
    both = np.hstack(sides)[:, :, ::-1]
    _, encoded = cv2.imencode(".jpg", both, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return data_uri(encoded.tobytes(), "image/jpeg")


def _markdown(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    lines = [f"# {title}", "", _literal(subtitle), ""]
    for section in sections:
        # The sentences below a picture say nothing without it.
        shown = [part for part in section.parts if part.table is not None or part.faces or not part.pictures]
        if not shown:
            continue
        lines += [f"## {section.title}", ""]
        for part in shown:
            if part.title:
                lines += [f"### {_literal(part.title)}", ""]
            if part.table is not None:
                lines += _markdown_table(part.table)
            for note in part.notes:
                lines += [_literal(note), ""]
            if part.faces:
                lines += ["; ".join(face.caption for face in part.faces) + ".", ""]
    return "\n".join([*lines, "Curves and pictures: report.html.", ""])


def _markdown_table(table: Table) -> list[str]:
    lines = ["| " + " | ".join(map(_literal, table.heads)) + " |"]
    lines.append("|" + "|".join(["---"] + ["---:"] * (len(table.heads) - 1)) + "|")
    for row in table.rows:
        lines.append("| " + " | ".join(_markdown_cell(cell) for cell in row) + " |")
    return [*lines, ""]


def _markdown_cell(cell: Cell) -> str:
    text = _literal(cell.text)
    number = f"**{text}**" if cell.best else text
    return f"{number} ({cell.detail})" if cell.detail else number


def _literal(text: str) -> str:
    """Text whose signs mean nothing to Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|&])", r"\\\1", text)
