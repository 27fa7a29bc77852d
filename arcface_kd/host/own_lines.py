"""Changes of single lines, for trainers that differ from today's arcface_torch: forks, and those of 2022.

A patch's hunks want the lines around them as they were. Where these are the user's own, the lines that stop a trainer
with today's torch and numpy are changed one by one. Each keeps the line that it replaces in a comment, so that it can
be taken out again byte for byte.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from arcface_kd.host.checkout import Change

_WAS = b"  # arcface_kd, was: "
_IMPORT = re.compile(rb"\s*(?:from \S+ )?import ([\w., ]+)\n")

# Where users add data sets, which read through mxnet as the one beside.
DATA_SETS = "dataset.py"
_MXNET = (
    (rb"import mxnet as (\w+)", rb"from arcface_kd.data import as_mxnet as \1"),
    (rb"import mxnet", rb"from arcface_kd.data import as_mxnet as mxnet"),
    (rb"from mxnet import ([\w, ]+)", rb"from arcface_kd.data.as_mxnet import \1"),
)
# What training stands on, by file. The rest of arcface_torch are tools.
_SUBSTITUTES: Mapping[str, tuple[tuple[bytes, bytes], ...]] = {
    DATA_SETS: _MXNET,
    # The FAR curve repeats values, which interp1d refuses.
    "eval/verification.py": (
        *_MXNET,
        (rb"(\w+ = )interpolate\.interp1d\((\w+), (\w+), kind=.slinear.\)", rb"\1lambda far: np.interp(far, \2, \3)"),
    ),
    "lr_scheduler.py": ((rb"(super\([^()]*\)\.__init__\(optimizer, .*), (?:verbose=)?(?:verbose|False)\)", rb"\1)"),),
    # torchrun tells the local rank by the environment alone.
    "train_v2.py": (
        (
            rb"(\w+\.add_argument\(.--local_rank.*), default=0(,.*)?\)",
            rb'\1, default=int(os.environ.get("LOCAL_RANK", 0))\2)',
        ),
    ),
}
TRAINING_FILES = frozenset(_SUBSTITUTES)


def substitute(path: str, lines: Sequence[bytes], *, revert: bool) -> list[bytes]:
    """Change the lines of a file that stop it, or take the changes out; a file that needs none comes back as it is."""
    return [_original(line) if revert else _changed(path, line) for line in lines]


def uses_what_goes(changes: Sequence[Change], lines: Sequence[bytes]) -> bool:
    """Whether lines outside a file's hunks use a name whose import the hunks take out, as a data set beside the own."""
    gone = {name for change in changes for name in _imported(change.original)}
    gone -= {name for change in changes for name in _imported(change.patched)}
    kept = Counter(lines)
    for change in changes:
        kept.subtract(change.original)
    used = b"".join(re.sub(rb"#.*", b"", line) for line in kept.elements())
    return any(re.search(rb"(?<![\w.])%s\b" % name, used) for name in gone)


def _imported(lines: Sequence[bytes]) -> set[bytes]:
    """The names that lines import."""
    clauses = [match.group(1).split(b",") for line in lines if (match := _IMPORT.fullmatch(line))]
    return {re.escape(name.split()[-1]) for names in clauses for name in names}


def is_substituted(lines: Sequence[bytes]) -> bool:
    """Whether a file holds lines that ``substitute`` has changed."""
    return any(_WAS in line for line in lines)


def _changed(path: str, line: bytes) -> bytes:
    text = line.rstrip(b"\n")
    indent, bare = text[: len(text) - len(text.lstrip())], text.lstrip()
    # A comment may stand behind the code.
    code = re.sub(rb"\s*#.*", b"", bare)
    if _WAS in line:
        return line
    for pattern, replacement in _SUBSTITUTES[path]:
        if match := re.fullmatch(pattern, code):
            return indent + match.expand(replacement) + _WAS + bare + line[len(text) :]
    return line


def _original(line: bytes) -> bytes:
    changed, marker, original = line.partition(_WAS)
    return changed[: len(changed) - len(changed.lstrip())] + original if marker else line
