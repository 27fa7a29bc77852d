"""The small diffs of ``patches/``, put into a checkout of arcface_torch and taken out again.

Behind ``arcface-kd patch DIR [NAME ...] [--check] [--revert]``. A patch is a plain unified diff, so ``git apply`` and
``patch -p1`` read it as well. What they do not promise is done here: every hunk is looked for by its lines, wherever
in the file they stand, and must fit in exactly one place; every file of every patch is checked before the first one is
written; each file is replaced in one step and keeps its line endings and its mode.
"""

import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from unidiff import Hunk, PatchedFile, PatchSet
from unidiff.constants import LINE_TYPE_NO_NEWLINE

from arcface_kd.errors import ConfigError, suggestion
from arcface_kd.system.files import atomic_write

FLAG = "kd_flag"
TRAINER = "train_v2.py"
# The second one is what the trainer needs with the torch and the numpy that this package asks for: torch's schedules
# have no `verbose` any more, and mxnet does not go with numpy 1.24 and newer.
NEEDED = (FLAG, "current_stack")
_TORCH_1_12 = "ab27f4d6 (2023-04-08)"
# A list of packages; one with lines of the user's own is left alone.
_REQUIREMENTS = "requirement.txt"
# The oldest commit of insightface that each patch fits.
_OLDEST = {FLAG: "4f227ba5 (2022-07-13)", "current_stack": _TORCH_1_12, "cpu_gloo": _TORCH_1_12}

# Where the flag's two hunks go beside lines of the user's own, and on which side of that line.
_ANCHORS = (
    re.compile(rb"(?P<indent>[ \t]*)(?P<config>\w+) *= *get_config\((?P<args>\w+)\b.*\n"),
    re.compile(rb"(?P<indent>[ \t]*)[^#\n]*\b(?P<parser>\w+)\.parse_args\(.*\n"),
)
_ADDED = (
    (b"from arcface_kd import attach\n", b"attach(%(config)s, %(args)s)\n"),
    (b"from arcface_kd import add_arguments\n", b"add_arguments(%(parser)s)\n"),
)

# What an earlier version's patches import from where it is no more; see also `arcface_kd/__init__.py`.
_MOVED = {
    b"from arcface_kd.hook import ": b"from arcface_kd import ",
    b"easydict\narcface_kd\nonnx\n": b"easydict\nonnx\n",
    b"from arcface_kd.data.recordio import ": b"from arcface_kd.data.formats.recordio import ",
    b"from arcface_kd.data.verification_bin import ": b"from arcface_kd.data.formats.verification_bin import ",
}


@dataclass(frozen=True)
class PatchOutcome:
    """What became, or with ``check`` would become, of one patch."""

    name: str  # the patch, as ``patches/NAME.patch``
    files: tuple[str, ...]  # the files that changed, relative to arcface_torch; empty when there was nothing to do
    added: int  # number of lines that came into those files
    removed: int  # number of lines that left them
    check: bool  # nothing was written
    revert: bool  # the patch was to be taken out

    def __str__(self) -> str:
        if not self.files:
            return f"{self.name}: {'not applied' if self.revert else 'already applied'}, nothing to do"
        verb = ("revert" if self.revert else "apply") if self.check else ("reverted" if self.revert else "applied")
        return (
            f"{self.name}: {'would ' if self.check else ''}{verb}, +{self.added} -{self.removed} lines in "
            f"{', '.join(self.files)}"
        )


@dataclass(frozen=True)
class _Change:
    """One hunk as two runs of lines: as the original file has them, and as the patched one does."""

    label: str
    line: int
    original: tuple[bytes, ...]
    patched: tuple[bytes, ...]


@dataclass
class _Text:
    """A file as lines that end in LF, as today's patches write them, and the line ending that it has on disk."""

    lines: list[bytes]
    crlf: bool

    @classmethod
    def read(cls, path: Path, patch: str) -> "_Text":
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise ConfigError(
                f"{path} is missing, and {patch}.patch changes it; get the whole of recognition/arcface_torch"
                f"{_fitting(patch)}"
            ) from None
        crlf = raw.count(b"\r\n")
        lf = raw.count(b"\n") - crlf
        if crlf and lf:
            raise ConfigError(
                f"{path} has {crlf} lines that end in CRLF and {lf} that end in LF; "
                "give all of them one ending (`git checkout` does), then patch again"
            )
        text = raw.replace(b"\r\n", b"\n")
        for earlier, now in _MOVED.items():
            text = text.replace(earlier, now)
        return cls(text.splitlines(keepends=True), crlf=crlf > 0)

    def to_bytes(self) -> bytes:
        raw = b"".join(self.lines)
        return raw.replace(b"\n", b"\r\n") if self.crlf else raw

    def places(self, wanted: Sequence[bytes]) -> list[int]:
        """Every index at which the run of lines stands."""
        run = list(wanted)
        return [at for at in range(len(self.lines) - len(run) + 1) if self.lines[at : at + len(run)] == run]

    def replace(self, old: Sequence[bytes], new: Sequence[bytes], label: str) -> None:
        """Put ``new`` where ``old`` stands, which must be one place."""
        places = self.places(old)
        if len(places) != 1:
            where = ", ".join(str(place + 1) for place in places) or "none"
            raise ConfigError(f"{label} should fit in one place and fits at lines: {where}; patch this file by hand")
        self.lines[places[0] : places[0] + len(old)] = new


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


def find_checkout(directory: str | os.PathLike[str]) -> Path:
    """The arcface_torch folder that ``directory`` is or, as a checkout of insightface, contains."""
    given = Path(directory)
    for folder in (given, given / "recognition" / "arcface_torch", given / "arcface_torch"):
        if (folder / TRAINER).is_file():
            return folder
    raise ConfigError(
        f"{given} is no checkout of arcface_torch: {TRAINER} is neither in it nor in its recognition/arcface_torch; "
        "name the folder that holds it"
    )


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
    checkout = find_checkout(directory)
    texts: dict[str, _Text] = {}
    before: dict[str, bytes] = {}
    outcomes = []
    for name in dict.fromkeys(names):
        files = _parse(name)
        changes = {file.path: _changes(name, file) for file in files}
        for path in changes:
            if path not in texts:
                # What is not there has nothing to be taken out.
                gone = revert and not (checkout / path).exists()
                texts[path] = _Text([], crlf=False) if gone else _Text.read(checkout / path, name)
                before[path] = texts[path].to_bytes()
        if name == FLAG and len(changes.get(TRAINER, ())) == len(_ANCHORS):
            changes[TRAINER] = [_beside_own_lines(n, c, texts[TRAINER]) for n, c in enumerate(changes[TRAINER])]
        if _REQUIREMENTS in changes and not _fits(changes[_REQUIREMENTS], texts[_REQUIREMENTS]):
            del changes[_REQUIREMENTS]
        parsed = [file for file in files if file.path in changes]
        applied = _is_applied(name, [(change, texts[path]) for path in changes for change in changes[path]], revert)
        due = applied == revert
        if due:
            for path in changes:
                for change in changes[path]:
                    old, new = (change.patched, change.original) if revert else (change.original, change.patched)
                    texts[path].replace(old, new, change.label)
        gain, loss = sum(file.added for file in parsed), sum(file.removed for file in parsed)
        outcomes.append(
            PatchOutcome(
                name=name,
                files=tuple(changes) if due else (),
                added=(loss if revert else gain) if due else 0,
                removed=(gain if revert else loss) if due else 0,
                check=check,
                revert=revert,
            )
        )
    if not check:
        after = {path: text.to_bytes() for path, text in texts.items()}
        _write({checkout / path: (before[path], after[path]) for path in texts if before[path] != after[path]})
    return outcomes


def _parse(name: str) -> PatchSet:
    folder = patches_folder()
    known = available_patches()
    if name not in known:
        raise ConfigError(f"no patch named {name!r}; there are: {', '.join(known)}{suggestion(name, known)}")
    return PatchSet((folder / f"{name}.patch").read_text(encoding="utf-8"))


def _changes(name: str, file: PatchedFile) -> list[_Change]:
    return [
        _Change(
            label=f"{file.path}: hunk {number} of {name}.patch",
            line=hunk.source_start,
            original=_run(hunk, "-"),
            patched=_run(hunk, "+"),
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


def _fits(changes: Sequence[_Change], text: _Text) -> bool:
    return all(text.places(change.original) or text.places(change.patched) for change in changes)


def _beside_own_lines(number: int, change: _Change, text: _Text) -> _Change:
    """A hunk of the flag, held by the one line that it needs where the user has lines of his own beside."""
    if _fits([change], text):
        return change
    found = [match for line in text.lines if (match := _ANCHORS[number].fullmatch(line))]
    if len(found) != 1:
        call = ("get_config(", "parse_args(")[number]
        raise ConfigError(
            f"{change.label} does not fit: {len(found)} lines of {TRAINER} call {call}. Add by hand, behind `cfg = "
            "get_config(...)`: `from arcface_kd import attach` and `attach(cfg, args)`; before `parser.parse_args()`: "
            "`from arcface_kd import add_arguments` and `add_arguments(parser)`"
            f"{_fitting(FLAG)}"
        )
    words = {name.encode(): word for name, word in found[0].groupdict().items()}
    added = tuple(words[b"indent"] + line % words for line in _ADDED[number])
    line = found[0].group()
    patched = (line, *added) if number == 0 else (*added, line)
    return _Change(change.label, change.line, (line,), patched)


def _fitting(name: str) -> str:
    return f"; insightface's commits from {_OLDEST[name]} on fit" if name in _OLDEST else ""


def _is_applied(name: str, changes: Sequence[tuple[_Change, _Text]], revert: bool) -> bool:
    """Whether all hunks of a patch are in place (``True``) or none is (``False``); refuse anything between.

    A hunk that does not fit is no obstacle where none is in place and the patch is to be taken out.
    """
    in_place, missing, unfit = [], [], []
    for change, text in changes:
        original, patched = bool(text.places(change.original)), bool(text.places(change.patched))
        if original and patched:
            # A hunk that only adds or only removes has the shorter lines among the longer ones.
            patched = len(change.patched) > len(change.original)
            original = not patched
        if patched:
            in_place.append(change)
        elif original:
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
                f"hand: the patches are in {patches_folder()}{_fitting(name)}"
            )
    if unfit and (in_place or not revert):
        raise ConfigError(unfit[0])
    if in_place and missing:
        raise ConfigError(
            f"{missing[0].label} is not applied, but {in_place[0].label} is; restore the files (`git checkout`) and "
            "patch again, or name the patches that are meant"
        )
    return bool(in_place)


def _write(files: dict[Path, tuple[bytes, bytes]]) -> None:
    """Replace each file's first content with its second, or leave all as they were."""
    written: list[Path] = []
    try:
        for path, (_, after) in files.items():
            _replace(path, after)
            written.append(path)
    except OSError as error:
        for path in written:
            _replace(path, files[path][0])
        raise ConfigError(f"{path} cannot be written: {error.strerror}; nothing was changed") from error


def _replace(path: Path, content: bytes) -> None:
    target = path.resolve()
    mode = stat.S_IMODE(target.stat().st_mode)
    with atomic_write(target) as stream:
        stream.write(content)
    target.chmod(mode)
