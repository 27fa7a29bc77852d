"""The parsers under a fuzzer that watches which lines a file reaches: ``python -m tests.coverage_fuzz FORMAT -runs=N``.

Needs atheris (``make fuzz`` installs it). Formats are those of ``tests/parser_fuzz.py``; what the fuzzer has found worth
keeping stays in the folder that libFuzzer's first argument names, if any. It stops at the first fault with the file's
bytes in ``crash-*``.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["arcface_kd"], enable_loader_override=False):
    from tests.parser_fuzz import FORMATS, attempt


def main() -> None:
    """Fuzz one format."""
    kind, *options = sys.argv[1:]
    form = FORMATS[kind]
    root = Path(tempfile.mkdtemp(prefix="arcface_kd_fuzz_", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        (root / "work").mkdir()
        (root / "seeds").mkdir()
        names = form.write(root / "work")
        originals = {name: (root / "work" / name).read_bytes() for name in names}
        good = form.read(root / "work")
        for number, name in enumerate(names):
            # The first byte says which of the files it is.
            (root / "seeds" / name).write_bytes(bytes([number]) + originals[name])

        def one(data: bytes) -> None:
            if not data:
                return
            name, content = names[data[0] % len(names)], data[1:]
            fault, _ = attempt(form, root / "work", good, name, originals[name], content)
            (root / "work" / name).unlink()
            (root / "work" / name).write_bytes(originals[name])
            if fault is not None and "wrong data was accepted" not in fault:
                raise AssertionError(f"{name}: {fault}")

        atheris.Setup([sys.argv[0], *options, str(root / "seeds")], one)
        atheris.Fuzz()
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
