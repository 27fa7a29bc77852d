"""The small diffs of ``patches/``, put into a checkout of arcface_torch and taken out again.

Behind ``arcface-kd patch DIR [NAME ...] [--check] [--revert]``. A patch is a plain unified diff, so ``git apply`` and
``patch -p1`` read it as well. What they do not promise is done here: every hunk is looked for by its lines, wherever
in the file they stand, and must fit in exactly one place; every file of every patch is checked before the first one is
written; each file is replaced in one step and keeps its line endings and its mode.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unidiff import Hunk, PatchedFile, PatchSet
from unidiff.constants import LINE_TYPE_NO_NEWLINE

from arcface_kd.errors import ConfigError, suggestion
from arcface_kd.host.checkout import (
    BY_HAND,
    FLAG,
    STACK,
    TRAINER,
    Change,
    Checkout,
    Text,
    find_checkout,
    fitting,
    is_in,
)
from arcface_kd.host.own_lines import DATA_SETS, TRAINING_FILES, is_substituted, substitute, uses_what_goes

# The second one is what the trainer needs with the torch and the numpy that this package asks for: torch's schedules
# have no `verbose` any more, and mxnet does not go with numpy 1.24 and newer.
NEEDED = (FLAG, STACK)

# Where the flag's two hunks go beside lines of the user's own, and on which side of that line.
_ANCHORS = (
    re.compile(rb"(?P<indent>[ \t]*)(?P<config>[\w.]+)(?: *:[^=\n]+)? *= *get_config\((?P<args>[\w.]+)\.\w+\b.*\n"),
    re.compile(rb"(?P<indent>[ \t]*)[^#\n]*(?<![\w.])(?P<parser>[\w.]+)\.parse_(?:known_)?args\(.*\n"),
)
_ADDED = (
    (b"from arcface_kd import attach\n", b"attach(%(config)s, %(args)s)\n"),
    (b"from arcface_kd import add_arguments\n", b"add_arguments(%(parser)s)\n"),
)
_ATTACH = re.compile(rb"[^#]*\battach\(")


@dataclass(frozen=True)
class PatchOutcome:
    """What became, or with ``check`` would become, of one patch."""

    name: str  # the patch, as ``patches/NAME.patch``
    files: tuple[str, ...]  # the files that changed, relative to arcface_torch; empty when there was nothing to do
    added: int  # number of lines that came into those files
    removed: int  # number of lines that left them
    check: bool  # nothing was written
    revert: bool  # the patch was to be taken out
    note: str = ""  # what the user has to know besides

    def __str__(self) -> str:
        return f"{self.name}: {self._what()}{self.note and f'; {self.note}'}"

    def _what(self) -> str:
        if not self.files:
            return f"{'not applied' if self.revert else 'already applied'}, nothing to do"
        verb = ("revert" if self.revert else "apply") if self.check else ("reverted" if self.revert else "applied")
        return f"{'would ' if self.check else ''}{verb}, +{self.added} -{self.removed} lines in {', '.join(self.files)}"


def patches_folder() -> Path:
    """The folder with the ``.patch`` files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    for folder in (package / "patches", package.parent / "patches"):
        if (folder / f"{FLAG}.patch").is_file():
            return folder
    raise ConfigError(f"no patches/{FLAG}.patch in {package} nor beside it; install arcface_kd again")


def available_patches() -> list[str]:
    """The names that ``patch_checkout`` knows, sorted."""
    return sorted(path.stem for path in patches_folder().glob("*.patch"))


def patch_checkout(
    directory: str | os.PathLike[str],
    names: Iterable[str] = (FLAG,),
    *,
    check: bool = False,
    revert: bool = False,
) -> list[PatchOutcome]:
    """Apply patches to a checkout, or take them out; all of them, or none.

    Args:
        directory: arcface_torch itself or a checkout of insightface.
        names: which patches, in any order; every patch stands alone.
        check: find out, and write nothing.
        revert: take the patches out; the files become what they were, byte for byte.

    Returns:
        One outcome for each name, in the given order. A patch that is in place already (or, to be taken out, is not)
        changes nothing.

    Raises:
        ConfigError: no such patch; no checkout; a file that lacks a hunk's lines, has them in several places, has
            only some hunks of a patch or mixed line endings; a file that cannot be written. Nothing has changed then.
    """
    checkout = Checkout(find_checkout(directory), revert)
    outcomes = []
    for name in dict.fromkeys(names):
        done = {FLAG: _patch_flag, STACK: _patch_stack}.get(name, _patch_all)(checkout, name)
        files = tuple(path for path, counts in done.counts.items() if counts != (0, 0))
        added, removed = (sum(counts[side] for counts in done.counts.values()) for side in (0, 1))
        outcomes.append(PatchOutcome(name, files, added, removed, check, revert, done.note))
    checkout.require_python()
    if not check:
        checkout.write()
    return outcomes


@dataclass
class _Done:
    """What one patch has done to the lines in memory: added and removed lines of each file."""

    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    note: str = ""


def _patch_all(checkout: Checkout, name: str) -> _Done:
    """Put all hunks of a patch in, or take all out."""
    return _together(checkout, name, {file.path: _changes(name, file) for file in _parse(name)})


def _together(checkout: Checkout, name: str, changes: Mapping[str, Sequence[Change]]) -> _Done:
    texts = {path: checkout.text(path, name) for path in changes}
    applied = _is_applied(
        name, [(change, texts[path]) for path in changes for change in changes[path]], checkout.revert
    )
    if applied != checkout.revert:
        return _Done()
    return _Done({path: checkout.replace(texts[path], changes[path]) for path in changes})


def _patch_flag(checkout: Checkout, name: str) -> _Done:
    """The flag's hunks, beside lines of the user's own where these stand between."""
    changes = {file.path: _changes(name, file) for file in _parse(name)}
    if len(changes.get(TRAINER, ())) != len(_ANCHORS):
        return _together(checkout, name, changes)
    text = checkout.text(TRAINER, name)
    by_hand = any(b"arcface_kd" in line for line in text.lines) and any(map(_ATTACH.match, text.lines))
    try:
        changes[TRAINER] = [_beside_own_lines(n, change, text) for n, change in enumerate(changes[TRAINER])]
    except ConfigError:
        if not by_hand:
            raise
    else:
        if not by_hand or any(is_in(change, text) for change in changes[TRAINER]):
            return _together(checkout, name, changes)
    note = f"{TRAINER} calls attach in lines of your own"
    if checkout.revert:
        return _Done(note=f"{note}, which stay")
    if not any(b"add_arguments(" in line for line in text.lines):
        note += ", but has no --kd: `arcface_kd.add_arguments(parser)` before `parse_args()` adds the flags"
    return _Done(note=note)


def _patch_stack(checkout: Checkout, name: str) -> _Done:
    """Each file by itself: as the patch has it, or by single lines, or left alone where training does without it."""
    changes: dict[str, Sequence[Change]] = {file.path: _changes(name, file) for file in _parse(name)}
    done, left = _Done(), []
    for path in dict.fromkeys([*changes, TRAINER]):
        if path not in TRAINING_FILES and path not in checkout:
            continue
        try:
            text = checkout.text(path, name)
        except ConfigError:
            if path in TRAINING_FILES:
                raise
            left.append(path)
            continue
        states = {is_in(change, text) for change in changes.get(path, ())}
        if path == DATA_SETS and states == {False} and uses_what_goes(changes[path], text.lines):
            states = {None}
        if len(states) == 1 and None not in states:
            if states == {checkout.revert}:
                done.counts[path] = checkout.replace(text, changes[path])
        elif path in TRAINING_FILES and (path == TRAINER or not checkout.revert or is_substituted(text.lines)):
            lines = substitute(path, text.lines, revert=checkout.revert)
            count = sum(new != old for new, old in zip(lines, text.lines, strict=True))
            done.counts[path], text.lines = (count, count), lines
        elif checkout.revert and b"arcface_kd" in text.to_bytes():
            raise ConfigError(
                f"{checkout.folder / path} was changed since {name} was put in, or another arcface_kd has put it in; "
                "restore the file (`git checkout`), or take arcface_kd's lines out by hand"
            )
        else:
            left.append(path)
    if left and not checkout.revert:
        done.note = f"left alone, for lines of your own that training does not need changed: {', '.join(left)}"
    return done


def _parse(name: str) -> PatchSet:
    folder = patches_folder()
    known = available_patches()
    if name not in known:
        raise ConfigError(f"no patch named {name!r}; there are: {', '.join(known)}{suggestion(name, known)}")
    return PatchSet((folder / f"{name}.patch").read_text(encoding="utf-8"))


def _changes(name: str, file: PatchedFile) -> list[Change]:
    return [
        Change(
            label=f"{file.path}: hunk {number} of {name}.patch",
            line=hunk.source_start,
            original=_run(hunk, "-"),
            patched=_run(hunk, "+"),
            added=hunk.added,
            removed=hunk.removed,
        )
        for number, hunk in enumerate(file, start=1)
    ]


def _run(hunk: Hunk, sign: str) -> tuple[bytes, ...]:
    """The hunk's context and its lines of one sign, as the file has them."""
    run: list[bytes] = []
    kept = False
    for line in hunk:
        if line.line_type == LINE_TYPE_NO_NEWLINE:
            # The marker speaks of the line before it, on whichever side that line is.
            if kept:
                run[-1] = run[-1].removesuffix(b"\n")
            continue
        kept = line.line_type in (" ", sign)
        if kept:
            run.append(line.value.encode())
    return tuple(run)


def _beside_own_lines(number: int, change: Change, text: Text) -> Change:
    """A hunk of the flag, held by the one line that it needs where the user has lines of his own beside."""
    if is_in(change, text) is not None:
        return change
    found = [match for line in text.lines if (match := _ANCHORS[number].fullmatch(line))]
    if len(found) != 1:
        call = ("get_config(", "parse_args(")[number]
        raise ConfigError(
            f"{change.label} does not fit: {len(found)} lines of {TRAINER} call {call}. {BY_HAND}{fitting(FLAG)}"
        )
    words = {name.encode(): word for name, word in found[0].groupdict().items()}
    added = tuple(words[b"indent"] + line % words for line in _ADDED[number])
    line = found[0].group()
    patched = (line, *added) if number == 0 else (*added, line)
    return Change(change.label, change.line, (line,), patched, len(added), 0)


def _is_applied(name: str, changes: Sequence[tuple[Change, Text]], revert: bool) -> bool:
    """Whether all hunks of a patch are in place (``True``) or none is (``False``); refuse anything between.

    A hunk that does not fit is no obstacle where none is in place and the patch is to be taken out.
    """
    in_place, missing, unfit = [], [], []
    for change, text in changes:
        state = is_in(change, text)
        if state:
            in_place.append(change)
        elif state is False:
            missing.append(change)
        else:
            present = set(text.lines)
            absent = next((line for line in change.original if line not in present), None)
            reason = (
                f"no line {absent.decode(errors='replace').strip()!r}"
                if absent is not None
                else f"its lines do not stand together as they do from line {change.line} in the original"
            )
            unfit.append(
                f"{change.label} does not fit: {reason}; restore the file (`git checkout`), or make the change by "
                f"hand: the patches are in {patches_folder()}{fitting(name)}"
            )
    if unfit and (in_place or not revert):
        raise ConfigError(unfit[0])
    if in_place and missing:
        raise ConfigError(
            f"{missing[0].label} is not applied, but {in_place[0].label} is; restore the files (`git checkout`) and "
            "patch again, or name the patches that are meant"
        )
    return bool(in_place)
