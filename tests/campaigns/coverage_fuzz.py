"""The parsers under a fuzzer that watches which lines a file reaches.

``python -m tests.campaigns.coverage_fuzz FORMAT FILE -runs=N``, with a format and a file of ``parser_fuzz.py``, such as
``records train.rec``; ``make fuzz`` runs them all. Needs atheris. It stops at the first fault, with the
file's bytes in ``crash-*``.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["arcface_kd"], enable_loader_override=False):
    from tests.campaigns.parser_fuzz import FORMATS, attempt


def main() -> None:
    """Fuzz one file of a format."""
    kind, name, *options = sys.argv[1:]
    form = FORMATS[kind]
    root = Path(tempfile.mkdtemp(prefix="arcface_kd_fuzz_", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        (root / "work").mkdir()
        (root / "seeds").mkdir()
        form.write(root / "work")
        original = (root / "work" / name).read_bytes()
        good = form.read(root / "work")
        (root / "seeds" / name).write_bytes(original)

        def one(data: bytes) -> None:
            fault, _ = attempt(form, root / "work", good, name, original, data)
            (root / "work" / name).unlink()
            (root / "work" / name).write_bytes(original)
            if fault is not None and "wrong data was accepted" not in fault:
                raise AssertionError(f"{name}: {fault}")

        atheris.Setup([sys.argv[0], "-len_control=0", *options, str(root / "seeds")], one)
        atheris.Fuzz()
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
