"""Every file that this package reads, mutated and read again: a message of ours, or an answer that the file supports.

A format says how to write good files, how to read them to the end, and what must hold when the mutated ones are read
without complaint: where a checksum or a length could tell, nothing but the good answer is accepted.
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import traceback
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from arcface_kd.checkpoints import files as checkpoint_files
from arcface_kd.checkpoints.files import HEAD, checkpoint_file
from arcface_kd.checkpoints.shards import open_shards
from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.data.formats.pair_identities import pair_identities, write_pair_identities
from arcface_kd.data.formats.verification_bin import decode, read_bin, write_bin
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ArcfaceKDError
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.cache import principal_components
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache
from arcface_kd.teachers.cache.principal_components import components_file, components_of_cache
from arcface_kd.teachers.options import TeacherOptions
from arcface_kd.teachers.state_dict import read_content
from tests.campaigns.kill_campaign import same
from tests.data.record_sets import encoded, insightface_records, write_records
from tests.teachers.mxnet_files import write_checkpoint
from tests.teachers.onnx_models import face_network

CPU_SECONDS = 20
MEMORY = 1 << 31
_LABELS = 3
_INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF]


class Hang(BaseException):
    """A file that takes too much of a processor's time; no parser catches it."""


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Change some bytes of a file: bits, bytes, whole numbers, cuts, repetitions, insertions."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        size = len(changed)
        if not size:
            break
        # Headers are short and matter most.
        at = draw.randrange(min(size, 64)) if draw.random() < 0.3 else draw.randrange(size)
        match draw.randrange(8):
            case 0:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                changed[at] = draw.randrange(256)
            case 2:
                width = draw.choice((1, 2, 4, 8))
                number = draw.choice(_INTERESTING) & ((1 << 8 * width) - 1)
                changed[at : at + width] = number.to_bytes(width, draw.choice(("little", "big")))
            case 3:
                del changed[at:]
            case 4:
                del changed[at : at + draw.randint(1, 32)]
            case 5:
                changed[at:at] = draw.randbytes(draw.randint(1, 32))
            case 6:
                other, length = draw.randrange(size), draw.randint(1, 64)
                changed[at : at + length] = changed[other : other + length]
            case _:
                digit = draw.choice(b"0123456789-+.eE,[]{}\"'\t\n")
                changed[at] = digit
    return bytes(changed)


def mutated_inside(data: bytes, draw: random.Random) -> bytes:
    """Change a record of a zip archive of ``torch.save`` and give it the right checksum, as an attacker would."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as whole, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as other:
        records = whole.infolist()
        victim = draw.choice([record.filename for record in records if record.file_size])
        for record in records:
            content = whole.read(record)
            other.writestr(record.filename, mutated(content, draw) if record.filename == victim else content)
    return changed.getvalue()


@dataclass(frozen=True)
class Format:
    """A kind of file."""

    write: Callable[[Path], list[str]]  # makes good files in a folder and returns the names of those to mutate
    read: Callable[[Path], Any]  # reads a folder to the end and returns what it holds
    # From what the good files hold, what the mutated ones hold and the name of the mutated one with its size before and
    # after: whether that may be accepted.
    holds: Callable[[Any, Any, str, int, int], bool]
    mutate: Callable[[bytes, random.Random], bytes] = mutated


def _anything(good: Any, found: Any, name: str, before: int, after: int) -> bool:
    return True


# Records ------------------------------------------------------------------------------------------------------------


def _write_records(folder: Path) -> list[str]:
    write_records(folder, insightface_records([2, 2, 1]))
    (folder / "property").write_text("3,112,112\n")
    return ["train.rec", "train.idx", "property"]


def _read_records(folder: Path) -> list[tuple[int, int, bytes]]:
    faces = RecordDataset(folder, num_classes=_LABELS)
    faces.labels()
    rows = []
    for index in range(len(faces)):
        image, label, _, _ = faces[index]
        assert image.shape == (3, 112, 112)
        rows.append((int(faces.keys[index]), label, image.numpy().tobytes()))
    return rows


def _records_hold(good: Any, found: Any, name: str, before: int, after: int) -> bool:
    if not all(-1 <= label < _LABELS for _, label, _ in found):
        return False
    # The index says where the last record begins, and that says where the file ends.
    return name != "train.rec" or before == after


# Verification sets ----------------------------------------------------------------------------------------------------


def _write_pairs(folder: Path) -> list[str]:
    write_bin(folder / "pairs.bin", [encoded(number) for number in range(4)], [True, False])
    return ["pairs.bin"]


def _read_pairs(folder: Path) -> Any:
    pairs = read_bin(folder / "pairs.bin")
    images = decode(pairs)
    assert images.shape == (2 * len(pairs.is_same), 3, 112, 112)
    return pairs.is_same.tolist()


# Images ---------------------------------------------------------------------------------------------------------------


def _write_images(folder: Path) -> list[str]:
    for name in ("a.jpg", "a.png", "a.bmp", "a.webp"):
        (folder / name).write_bytes(encoded(1, name[1:], 24, 24))
    progressive = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    (folder / "b.jpg").write_bytes(cv2.imencode(".jpg", np.zeros((24, 24, 3), np.uint8), progressive)[1].tobytes())
    return ["a.jpg", "a.png", "a.bmp", "a.webp", "b.jpg"]


def _read_images(folder: Path) -> Any:
    shapes = {}
    for path in sorted(folder.iterdir()):
        pixels = decode_rgb(path.read_bytes())
        assert pixels.dtype == np.uint8
        shapes[path.name] = pixels.shape
    return shapes


# The cache ------------------------------------------------------------------------------------------------------------

_IDENTITY = {
    **{"format": 1, "teacher": "t" * 64, "preprocessing": {"channels": "rgb", "mean": 127.5}, "precision": "fp32"},
    **{"data": "d" * 64, "images": 20, "embedding_size": 8},
}


def _write_cache(folder: Path) -> list[str]:
    cache = EmbeddingCache(folder / "rows", _IDENTITY)
    rows = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    for flipped in (False, True):
        cache.store(torch.arange(20), torch.full((20,), flipped), rows)
    return ["rows", "rows.json"]


def _read_cache(folder: Path) -> Any:
    cache = EmbeddingCache(folder / "rows", _IDENTITY, create=False)
    rows, known = cache.look_up(torch.arange(20), torch.zeros(20) > 0)
    assert ((rows[known].norm(dim=1) - 1).abs() < 1e-5).all()
    assert rows[~known].isnan().all()
    for _ in cache.blocks(0, 20):
        pass
    return json.loads((folder / "rows.json").read_text())


def _cache_holds(good: Any, found: Any, name: str, before: int, after: int) -> bool:
    return bool(found == good) if name == "rows.json" else before == after


# Checkpoints ----------------------------------------------------------------------------------------------------------


def _state(start: int, stop: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(start)
    head = {
        "class_range": torch.tensor([start, stop, 9]),
        "step": torch.tensor(3),
        "methods.classifier.weight": torch.randn(stop - start, 4, generator=generator),
    }
    return {"epoch": 1, "global_step": 3, HEAD: head, "state_optimizer": {"state": {}, "param_groups": []}}


def _write_run(folder: Path) -> list[str]:
    torch.save(_state(0, 5), checkpoint_file(folder, 0))
    torch.save(_state(5, 9), checkpoint_file(folder, 1))
    return ["checkpoint_gpu_0.pt", "checkpoint_gpu_1.pt"]


def _read_run(folder: Path) -> Any:
    shards = open_shards(folder)
    return shards.class_centers(0, shards.num_classes)


def _run_holds(good: Any, found: Any, name: str, before: int, after: int) -> bool:
    return same(good, found)


def _write_state(folder: Path) -> list[str]:
    state = {"a.weight": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)), "a.count": torch.tensor(3)}
    torch.save({"state_dict": state}, folder / "new.pt")
    return ["new.pt"]


def _write_old_state(folder: Path) -> list[str]:
    _write_state(folder)
    state = torch.load(folder / "new.pt", weights_only=True)
    torch.save(state, folder / "new.pt", _use_new_zipfile_serialization=False)
    return ["new.pt"]


def _read_state(folder: Path) -> Any:
    content = read_content(folder / "new.pt")
    # Mapped tensors are looked at before the file goes.
    return json.loads(json.dumps(content, default=lambda value: [list(value.shape), value.reshape(-1).tolist()]))


def _state_holds(good: Any, found: Any, name: str, before: int, after: int) -> bool:
    return bool(good == found)


# What stands beside a cache or a verification set ---------------------------------------------------------------------


def _write_components(folder: Path) -> list[str]:
    _write_cache(folder)
    components_of_cache(EmbeddingCache(folder / "rows", _IDENTITY), RankGroup(alone=True))
    return ["rows.pca.npz"]


def _read_components(folder: Path) -> Any:
    cache = EmbeddingCache(folder / "rows", _IDENTITY, create=False)
    components = principal_components._read(components_file(cache), cache)
    # None is a damaged file: the components are found anew.
    return None if components is None else [components.axes.tolist(), components.mean.tolist(), components.count]


def _components_hold(good: Any, found: Any, name: str, before: int, after: int) -> bool:
    return found is None or bool(found == good)


def _write_names(folder: Path) -> list[str]:
    _write_pairs(folder)
    write_pair_identities(folder / "pairs.bin", ["Ann", "Ann", "Bob", "Cem"])
    return ["pairs.identities.txt"]


def _read_names(folder: Path) -> Any:
    return pair_identities(folder / "pairs.bin", read_bin(folder / "pairs.bin")).numbers.tolist()


# Teachers -------------------------------------------------------------------------------------------------------------


def _write_onnx(folder: Path) -> list[str]:
    arrays = {
        "conv1": np.ones((2, 3, 8, 8), np.float32) / 50,
        "conv2": np.arange(392, dtype=np.float32).reshape(4, 2, 7, 7) / 400,
        "slope": np.full((2, 1, 1), 0.25, np.float32),
        "matrix": np.eye(16, 16, dtype=np.float32),
    }
    (folder / "model.onnx").write_bytes(face_network(arrays=arrays).SerializeToString())
    return ["model.onnx"]


def _embed(folder: Path, name: str) -> Any:
    teacher = load_teacher(folder / name, TeacherOptions())
    rows = teacher(torch.linspace(-1, 1, 2 * 3 * 112 * 112).reshape(2, 3, 112, 112))
    return list(rows.shape)


def _write_mxnet(folder: Path) -> list[str]:
    write_checkpoint(folder)
    return ["model-symbol.json", "model-0000.params"]


FORMATS: dict[str, Format] = {
    "records": Format(_write_records, _read_records, _records_hold),
    "pairs": Format(_write_pairs, _read_pairs, _anything),
    "images": Format(_write_images, _read_images, _anything),
    "cache": Format(_write_cache, _read_cache, _cache_holds),
    "run": Format(_write_run, _read_run, _run_holds),
    "state": Format(_write_state, _read_state, _state_holds),
    "forged_state": Format(_write_state, _read_state, _anything, mutated_inside),
    "forged_run": Format(_write_run, _read_run, _anything, mutated_inside),
    "old_state": Format(_write_old_state, _read_state, _anything),
    "components": Format(_write_components, _read_components, _components_hold),
    "names": Format(_write_names, _read_names, _anything),
    "onnx": Format(_write_onnx, lambda folder: _embed(folder, "model.onnx"), _anything),
    "mxnet": Format(_write_mxnet, lambda folder: _embed(folder, "model-0000.params"), _anything),
}


def attempt(form: Format, folder: Path, good: Any, name: str, data: bytes, content: bytes) -> tuple[str | None, bool]:
    """Read a folder with one file mutated from ``data`` to ``content``; the caller restores it.

    None for a message of ours or an answer that may be accepted, else what happened; whether there was an answer.
    """
    (folder / name).write_bytes(content)
    try:
        found = form.read(folder)
    except ArcfaceKDError as error:
        return None if "\n" not in str(error) else f"a message of several lines: {str(error)[:300]!r}", False
    except Hang:
        return f"more than {CPU_SECONDS} s of processor time", False
    except BaseException:
        return traceback.format_exc()[-1500:], False
    if content != data and not form.holds(good, found, name, len(data), len(content)):
        return f"wrong data was accepted: {found!r:.300}", True
    return None, True


def _hang(signum: int, frame: object) -> None:
    raise Hang


def campaign(kind: str, work: str, seed: int, count: int) -> int:
    """Mutate and read so many files, in this process, with bounds on its time and memory; 1 where one is at fault.

    In the folder ``work``, ``progress`` says which file is being read, ``faults`` what went wrong.
    """
    warnings.simplefilter("ignore")
    form, root = FORMATS[kind], Path(work)
    (root / "good").mkdir(parents=True)
    names = form.write(root / "good")
    shutil.copytree(root / "good", root / "mutated")
    originals = {name: (root / "good" / name).read_bytes() for name in names}
    good = form.read(root / "mutated")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGPROF, _hang)
    faults, refused = [], 0
    for number in range(count):
        draw = random.Random(f"{kind} {seed} {number}")
        name = draw.choice(names)
        content = form.mutate(originals[name], draw)
        (root / "progress").write_text(f"{kind}, seed {seed}, number {number}, file {name}")
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        checkpoint_files._fault.cache_clear()
        fault, accepted = attempt(form, root / "mutated", good, name, originals[name], content)
        refused += not accepted
        signal.setitimer(signal.ITIMER_PROF, 0)
        (root / "mutated" / name).unlink()
        (root / "mutated" / name).write_bytes(originals[name])
        if fault is not None:
            (root / f"fault_{number}_{name}").write_bytes(content)
            faults.append(f"{kind}, seed {seed}, number {number}, file {name}: {fault}")
    (root / "refused").write_text(str(refused))
    (root / "faults").write_text("\n\n".join(faults))
    return int(bool(faults))
