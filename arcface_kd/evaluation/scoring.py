"""``arcface-kd eval``: any models on verification sets, IJB and TinyFace, as a table and as JSON."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arcface_kd.backbones import OWN
from arcface_kd.backbones.face_backbone import evaluating
from arcface_kd.data.formats.ijb import IJBSet, is_ijb, read_ijb
from arcface_kd.data.formats.tinyface import TinyFaceSet, is_tinyface, read_tinyface
from arcface_kd.data.formats.verification_bin import VerificationSet, decode, list_bins
from arcface_kd.errors import ConfigError, DataError
from arcface_kd.evaluation.embedding import sum_of_views
from arcface_kd.evaluation.pair_views import embed_sizes, pair_views
from arcface_kd.evaluation.report.cost import latency
from arcface_kd.evaluation.score_table import table
from arcface_kd.evaluation.templates import embed_templates, judge_templates
from arcface_kd.evaluation.tinyface import embed_tinyface, judge_tinyface
from arcface_kd.evaluation.verification import read_sets, verify
from arcface_kd.system.device import default_device
from arcface_kd.system.files import atomic_write, require_folder_of
from arcface_kd.teachers.base import Teacher, load_teacher, local_path
from arcface_kd.teachers.checkpoint import is_run_folder, own_network_in_log, weights_file
from arcface_kd.teachers.options import Preprocessing, TeacherOptions

Numbers = Mapping[str, int | float | None]
TemplateSet = IJBSet | TinyFaceSet


@dataclass(frozen=True)
class Score:
    """One model on one set by one protocol."""

    model: str  # as it was named
    set: str  # the set's name, the group's, or ``one image`` for the cost
    # ``pairs`` for verification sets, ``groups`` for several of them, ``1:1`` and ``1:N`` for IJB's, ``tinyface``, and
    # ``cost``.
    protocol: str
    input: str  # how the model's input was prepared
    numbers: Numbers  # by name; shares in [0, 1], ``None`` where the set is too small to tell
    low_res: str = ""  # which side of the pairs was downscaled to what; empty for none
    gallery: str = ""  # the model that embedded the gallery; empty for the model itself

    def as_row(self) -> dict[str, str | int | float | None]:
        """For ``json.dumps``."""
        return {
            "set": self.set,
            "model": self.model,
            "protocol": self.protocol,
            "input": self.input,
            "low_res": self.low_res or None,
            "gallery": self.gallery or None,
            **self.numbers,
        }


def load_models(
    sources: Sequence[str], options: Mapping[str, object] | None = None, *, device: torch.device | None = None
) -> dict[str, Teacher]:
    """Load models to judge by the names that were given, all of them before the first is asked.

    Options are for those that are no run folders; what a run trains sees RGB as (x - 127.5) / 127.5 and nothing else. A
    ``network`` of the user's own is also that of the run folders whose log names it or that have no log.
    """
    twice = next((source for place, source in enumerate(sources) if source in sources[:place]), None)
    if twice is not None:
        raise ConfigError(f"{twice} is given twice; name each model once")
    checked = TeacherOptions.of(options)
    own = checked.network if checked.network and checked.network.startswith(OWN) else None
    runs = {source: own is not None and _may_be(own, source) for source in sources if is_run_folder(source)}
    if checked != TeacherOptions(network=own if any(runs.values()) else None) and len(runs) == len(sources):
        raise ConfigError(
            f"teacher options were given, but {', '.join(sources)} is what this trainer trained, which takes RGB as "
            "(x - 127.5) / 127.5; leave the options out"
        )
    # Models are judged in full precision, also where a run's teacher would compute in fp16.
    exact = replace(checked, precision=checked.precision or "fp32")
    trained = TeacherOptions(precision="fp32")
    named = replace(trained, network=own)
    return {
        source: load_teacher(source, (named if runs[source] else trained) if source in runs else exact, device=device)
        for source in sources
    }


def _may_be(own: str, source: str) -> bool:
    """Whether a run folder's log names this network, or says nothing."""
    folder = Path(source).expanduser()
    return own_network_in_log(folder) == own or not (folder / "training.log").is_file()


def find_files(folders: Sequence[str | os.PathLike[str]]) -> tuple[list[Path], list[TemplateSet]]:
    """Find all sets of some folders: the verification sets' files by name, and the lists of the others.

    Folders hold ``.bin`` files, or are laid out as InsightFace's IJB (``meta``, ``loose_crop``) or TinyFace (``Probe``,
    ``Gallery_Match``, ``Gallery_Distractor``); a ``.bin`` file stands for itself.
    """
    files: list[Path] = []
    others: list[TemplateSet] = []
    for folder in map(Path, folders):
        bins = [folder] if folder.is_file() else list_bins(folder)
        found: list[TemplateSet] = [read_ijb(folder)] if is_ijb(folder) else []
        found += [read_tinyface(folder)] if is_tinyface(folder) else []
        if not bins and not found:
            met = "holds no set" if folder.is_dir() else "is no folder"
            raise DataError(
                f"{folder} {met}; wanted verification sets (*.bin), IJB as InsightFace lays it out "
                "(meta/*_face_tid_mid.txt, loose_crop/) or TinyFace (Probe/, Gallery_Match/, Gallery_Distractor/)"
            )
        files += bins
        others += found
    return files, others


def find_sets(
    folders: Sequence[str | os.PathLike[str]], groups: Mapping[str, Sequence[Path]] | None = None
) -> list[VerificationSet | TemplateSet]:
    """Read all sets of some folders, and the groups' files besides; of IJB and TinyFace only the lists."""
    files, others = find_files(folders)
    return [*read_sets([*files, *(file for group in (groups or {}).values() for file in group)]), *others]


def _embedded(one: TemplateSet | Tensor, model: nn.Module, low_res: Sequence[int], settings: Mapping[str, Any]) -> Any:
    """All that one model has to say about a set."""
    if isinstance(one, IJBSet):
        return embed_templates(model, one, **settings)
    if isinstance(one, TinyFaceSet):
        return embed_tinyface(model, one, **settings)
    return embed_sizes(model, one, low_res, **settings)


def _judged(one: VerificationSet | TemplateSet, own: Any, enrolled: Any) -> Iterator[tuple[str, str, Numbers]]:
    """Low resolution, protocol and numbers of what :func:`_embedded` gave for a model and for the gallery's."""
    if isinstance(one, IJBSet):
        yield from (("", *row) for row in judge_templates(one, own, enrolled).as_rows().items())
    elif isinstance(one, TinyFaceSet):
        yield "", "tinyface", judge_tinyface(one, own, enrolled)
    else:
        yield from ((view, "pairs", verify(rows, one.is_same).as_row()) for view, rows in pair_views(own, enrolled))


def score(
    models: Mapping[str, nn.Module],
    sets: Sequence[VerificationSet | TemplateSet],
    *,
    low_res: Sequence[int] = (),
    gallery: tuple[str, nn.Module] | None = None,
    batch_size: int = 128,
    device: torch.device | None = None,
    progress: bool = False,
) -> Iterator[Score]:
    """Judge models, set by set; scores come as they are found.

    Each verification set is judged, besides, with one image of its pairs downscaled to each of ``low_res`` sides, and
    with both; each model, besides, with its probes against the gallery's model.
    """
    if gallery is not None:
        require_one_dimension(models, gallery)
    settings = {"batch_size": batch_size, "device": device, "progress": progress}
    for one in sets:
        images = decode(one) if isinstance(one, VerificationSet) else one
        enrolled = None
        others = models if gallery is None or gallery[0] in models else {gallery[0]: gallery[1], **models}
        # The gallery's model first, since the others are held against it.
        for name in sorted(others, key=lambda name: gallery is not None and name != gallery[0]):
            model = others[name]
            try:
                own = _embedded(images, model, low_res, settings)
                asked = [("", own)] if name in models else []
                if gallery is not None and name == gallery[0]:
                    enrolled = own
                elif gallery is not None:
                    asked.append((gallery[0], enrolled))
                for source, templates in asked:
                    for view, protocol, numbers in _judged(one, own, templates):
                        yield Score(name, one.name, protocol, _input_of(model), numbers, view, source)
            except DataError as error:
                raise DataError(f"{name} on {one.name}: {error}") from None


def _input_of(model: nn.Module) -> str:
    return str(model.preprocessing if isinstance(model, Teacher) else Preprocessing())


def require_one_dimension(models: Mapping[str, nn.Module], gallery: tuple[str, nn.Module]) -> None:
    """Insist on models whose embeddings can be compared with a gallery's."""
    sizes = {}
    for name, model in (gallery, *models.items()):
        with evaluating(model):
            sizes[name] = sum_of_views(model, torch.zeros(1, 3, 112, 112, dtype=torch.uint8), flip=False).shape[1]
    for name, size in sizes.items():
        if size != sizes[gallery[0]]:
            raise ConfigError(
                f"{name} embeds in {size} dimensions, the gallery's model {gallery[0]} in {sizes[gallery[0]]}; wanted "
                "a student that was distilled from it without a projection"
            )


def group_scores(
    groups: Mapping[str, Sequence[Path]], sets: Sequence[VerificationSet | TemplateSet], scores: Sequence[Score]
) -> Iterator[Score]:
    """Sum up verification sets as RFW's papers do: mean accuracy, spread, and how much worse the worst one is.

    For each group, model, gallery and resolution: ``accuracy`` (mean), ``accuracy_std`` (over the sets, N - 1) and
    ``worst_over_best_error`` (RFW's skewed error ratio; ``None`` where the best set has no error).
    """
    for group, files in groups.items():
        members = {file.resolve() for file in files}
        names = {
            one.name for one in sets if isinstance(one, VerificationSet) and one.path and one.path.resolve() in members
        }
        chosen = [one for one in scores if one.protocol == "pairs" and one.set in names]
        for key in dict.fromkeys((one.low_res, one.model, one.gallery, one.input) for one in chosen):
            low_res, model, gallery, shown = key
            values = [
                float(one.numbers["accuracy"] or 0)
                for one in chosen
                if (one.low_res, one.model, one.gallery, one.input) == key
            ]
            yield Score(model, group, "groups", shown, group_numbers(values), low_res, gallery)


def group_numbers(accuracies: Sequence[float]) -> dict[str, int | float | None]:
    """The numbers of :func:`group_scores`, from the accuracies of two sets at least."""
    errors = 1 - np.array(accuracies)
    return {
        "sets": len(accuracies),
        "accuracy": float(np.mean(accuracies)),
        "accuracy_std": float(np.std(accuracies, ddof=1)),
        "worst_over_best_error": float(errors.max() / errors.min()) if errors.min() > 0 else None,
    }


def _costs(models: Mapping[str, Teacher], device: torch.device) -> Iterator[Score]:
    """Latency and file size of each model."""
    for name, model in models.items():
        path = local_path(name)
        file = None if path is None else weights_file(path)
        found = latency(model, file, model.preprocessing.size, device)
        numbers = {
            "p50_ms": None if found is None else found.p50,
            "p95_ms": None if found is None else found.p95,
            "file_bytes": None if file is None else file.stat().st_size,
        }
        yield Score(name, "one image", "cost", _input_of(model), numbers)


def write_json(path: str | os.PathLike[str], scores: Sequence[Score]) -> None:
    """Write scores as a JSON list with one object for each model, set and protocol."""
    with atomic_write(path) as stream:
        stream.write((json.dumps([one.as_row() for one in scores], indent=2, allow_nan=False) + "\n").encode())


def run_eval(
    sources: Sequence[str],
    folders: Sequence[str | os.PathLike[str]],
    options: Mapping[str, object] | None = None,
    *,
    out: Path | None = None,
    batch_size: int = 128,
    low_res: Sequence[int] = (),
    groups: Mapping[str, Sequence[Path]] | None = None,
    gallery: str | None = None,
) -> list[Score]:
    """Judge models, print the table, write the JSON file; after an error, the table of what was judged before it."""
    # Hours of IJB-C must not end in a missing folder.
    if out is not None:
        require_folder_of(out)
    device = default_device()
    sets = find_sets(folders, groups)
    loaded = load_models(sources if gallery in (None, *sources) else [*sources, str(gallery)], options, device=device)
    models = {source: loaded[source] for source in sources}
    scores: list[Score] = []
    try:
        judged = score(
            models,
            sets,
            low_res=low_res,
            gallery=None if gallery is None else (gallery, loaded[gallery]),
            batch_size=batch_size,
            device=device,
            progress=True,
        )
        scores.extend(judged)
        scores.extend(group_scores(groups or {}, sets, scores))
        scores.extend(_costs(models, device))
    finally:
        # Also what was judged before a file that cannot be read, or before somebody lost patience.
        if scores:
            print(table(scores), flush=True)
    if out is not None:
        write_json(out, scores)
        print(f"\n{out}: {len(scores)} rows")
    return scores
