"""Files of ``torch.save``: written whole or not at all, and held against their own checksums before they are read."""

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from arcface_kd.errors import ResourceError, first_line
from arcface_kd.system.files import atomic_write


def save_tensors(path: str | os.PathLike[str], content: object) -> None:
    """Write what ``torch.save`` writes; the file is replaced in one step."""
    try:
        with atomic_write(path) as stream:
            torch.save(content, stream)
    except (OSError, RuntimeError) as error:
        # What goes wrong while torch writes comes out as its own complaint about the position in the file.
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, KeyboardInterrupt):
            raise reason from None
        if not isinstance(reason, OSError):
            raise
        raise ResourceError(
            f"cannot write {path}: {reason.strerror or reason}; what was there before is untouched"
        ) from error


def archive_fault(path: Path) -> str | None:
    """What torch would read over without a word: damaged records, and some that unpack to more than the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if not any(record.filename.endswith("/data.pkl") for record in records):
                return "it is a zip archive, but not a PyTorch checkpoint: no data.pkl in it"
            for record in records:
                if record.compress_type != zipfile.ZIP_STORED:
                    return f"record {record.filename!r} is compressed, which torch.save never does"
            if sum(record.file_size for record in records) > path.stat().st_size:
                return "its records claim more bytes than the file has"
            damaged = archive.testzip()
    # zipfile raises struct.error, NotImplementedError, UnicodeDecodeError and more besides BadZipFile on mangled files.
    except Exception as error:
        return f"damaged or cut short: {' '.join(str(error).split())[:200] or type(error).__name__}"
    if damaged is None:
        return None
    return (
        f"checksum of record {damaged!r} is wrong; the file is damaged, get it again (or it was saved with "
        "torch.serialization.set_crc32_options(False): save it without)"
    )


def refusal(error: Exception) -> str:
    """What a file is that ``torch.load`` has refused; torch's own words advise to trust it."""
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"holds more than tensors, and loading it could run code: an object of {found[1]}; save its state_dict() "
            "and name that file"
        )
    if found := re.search(r"Unsupported operand (\d+)", text):
        return "is of a pickle protocol that torch cannot read safely; save it again with torch.save(state_dict, FILE)"
    if "weights_only" in text:
        return "holds more than tensors, and loading it could run code; save its state_dict() and name that file"
    return f"is damaged or not a PyTorch checkpoint: {first_line(error)}"


def tensor_fault(content: object) -> str | None:
    """What makes a tensor one that no trainer saves: a few bytes can stand for any number of others."""
    pending: list[tuple[object, object]] = [("", content)]
    seen: set[int] = set()
    while pending:
        name, value = pending.pop()
        if isinstance(value, Tensor):
            called = f"tensor {str(name)[:100]!r}"
            if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta:
                return f"{called} is not a plain dense tensor"
            stored = value.untyped_storage().nbytes()
            if value.numel() * value.element_size() > stored:
                return f"{called} of shape {tuple(value.shape)} has only {stored} bytes in the file"
        # A pickle may name one list again and again.
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            pending.extend(value.items() if isinstance(value, Mapping) else ((name, each) for each in value))
    return None
