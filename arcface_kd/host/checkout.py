"""A checkout of arcface_torch: its files as lines, changed in memory and written together."""

import ast
import os
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arcface_kd.errors import ConfigError
from arcface_kd.system.files import atomic_write

FLAG = "kd_flag"
STACK = "current_stack"
TRAINER = "train_v2.py"
# The oldest commit of insightface with train_v2.py, and the oldest one that each patch fits.
_FIRST = "4f227ba5 (2022-07-13)"
_OLDEST = {FLAG: _FIRST, STACK: _FIRST, "cpu_gloo": "ab27f4d6 (2023-04-08)"}

BY_HAND = (
    "Add by hand, behind `cfg = get_config(...)`: `from arcface_kd import attach` and `attach(cfg, args)`; before "
    "`parser.parse_args()`: `from arcface_kd import add_arguments` and `add_arguments(parser)`"
)
_ALONE = f"; `arcface-kd patch DIR {FLAG}` is enough where the trainer runs as it is"

# What an earlier version's patches import from where it is no more; see also `arcface_kd/__init__.py`.
_MOVED = {
    b"from arcface_kd.hook import ": b"from arcface_kd import ",
    b"easydict\narcface_kd\nonnx\n": b"easydict\nonnx\n",
    b"from arcface_kd.data.recordio import ": b"from arcface_kd.data.formats.recordio import ",
    b"from arcface_kd.data.verification_bin import ": b"from arcface_kd.data.formats.verification_bin import ",
}


@dataclass(frozen=True)
class Change:
    """One hunk as two runs of lines: as the original file has them, and as the patched one does."""

    label: str
    line: int
    original: tuple[bytes, ...]
    patched: tuple[bytes, ...]
    added: int
    removed: int


@dataclass
class Text:
    """A file as lines that end in LF, as today's patches write them, and the line ending that it has on disk."""

    lines: list[bytes]
    crlf: bool

    @classmethod
    def read(cls, path: Path, patch: str) -> "Text":
        """Read a file, for the patch that changes it."""
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise ConfigError(
                f"{path} is missing, and {patch}.patch changes it; get the whole of recognition/arcface_torch"
                f"{fitting(patch)}{_ALONE if patch == STACK else ''}"
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
        """The file as it is written."""
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


def is_in(change: Change, text: Text) -> bool | None:
    """Whether a hunk is in place, or its file as it was before; None where neither holds."""
    original, patched = bool(text.places(change.original)), bool(text.places(change.patched))
    if original and patched:
        # A hunk that only adds or only removes has the shorter lines among the longer ones.
        return len(change.patched) > len(change.original)
    return patched if original or patched else None


def fitting(name: str) -> str:
    """The end of a message: which commits of insightface a patch fits."""
    return f"; insightface's commits from {_OLDEST[name]} on fit" if name in _OLDEST else ""


def find_checkout(directory: str | os.PathLike[str]) -> Path:
    """The arcface_torch folder that ``directory`` is or, as a checkout of insightface, contains."""
    given = Path(directory)
    folders = (given, given / "recognition" / "arcface_torch", given / "arcface_torch")
    for folder in folders:
        if (folder / TRAINER).is_file():
            return folder
    for folder in folders:
        if (folder / "train.py").is_file():
            raise ConfigError(
                f"{folder} is older than insightface's commit {_FIRST}: it has train.py, and no {TRAINER}, which the "
                "patches change; take a newer one, or `arcface-kd train`, which needs none"
            )
        if (folder / "backbones").is_dir():
            raise ConfigError(
                f"{folder} has no {TRAINER}, which the patches change. In a trainer by another name: {BY_HAND}"
            )
    raise ConfigError(
        f"{given} is no checkout of arcface_torch: {TRAINER} is neither in it nor in its recognition/arcface_torch; "
        "name the folder that holds it"
    )


class Checkout:
    """The files of a checkout as they are read, patched in memory, and written together."""

    def __init__(self, folder: Path, revert: bool) -> None:
        self.folder = folder
        self.revert = revert
        self._texts: dict[str, Text] = {}
        self._before: dict[str, bytes] = {}

    def __contains__(self, path: str) -> bool:
        return (self.folder / path).exists()

    def text(self, path: str, patch: str) -> Text:
        """A file's lines, with what the patches before have changed."""
        if path not in self._texts:
            # What is not there has nothing to be taken out.
            gone = self.revert and path not in self
            self._texts[path] = Text([], crlf=False) if gone else Text.read(self.folder / path, patch)
            self._before[path] = self._texts[path].to_bytes()
        return self._texts[path]

    def replace(self, text: Text, changes: Sequence[Change]) -> tuple[int, int]:
        """Put a file's changes in, or take them out; lines added and removed."""
        for change in changes:
            old, new = (change.patched, change.original) if self.revert else (change.original, change.patched)
            text.replace(old, new, change.label)
        counts = sum(change.added for change in changes), sum(change.removed for change in changes)
        return counts[::-1] if self.revert else counts

    def _changed(self) -> dict[str, tuple[bytes, bytes]]:
        after = {path: text.to_bytes() for path, text in self._texts.items()}
        return {path: (self._before[path], raw) for path, raw in after.items() if raw != self._before[path]}

    def require_python(self) -> None:
        """Refuse a file that was Python and is none any more: a line has come into a call of several lines."""
        for path, (before, after) in self._changed().items():
            if not path.endswith(".py") or not _is_python(before) or _is_python(after):
                continue
            raise ConfigError(f"{self.folder / path}: the patch does not fit between its lines. {BY_HAND}")

    def write(self) -> None:
        """Replace all changed files, or leave all as they were."""
        changed = {self.folder / path: after for path, (_, after) in self._changed().items()}
        # What is put back when a write fails is the file itself, with an earlier version's imports.
        _write({path: (path.read_bytes(), after) for path, after in changed.items()})


def _is_python(source: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(source)
        except (SyntaxError, ValueError):
            return False
    return True


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
