"""The RecordIO loader against mxnet's: images/s of one worker, opening a large index, the memory that it takes.

Providers:
    arcface_kd: ``RecordDataset`` and ``RecordReader``.
    quality: the same with the views of ``student.augment=quality``.
    mxnet: ``MXIndexedRecordIO`` with ``recordio.unpack`` and ``image.imdecode``, as arcface_torch's data set calls
        them; left out where mxnet is not installed.
"""

import multiprocessing
import os
import random
import struct
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from arcface_kd.config.augmentation import PRESETS
from arcface_kd.data.dataset import RecordDataset, View
from arcface_kd.data.formats.recordio import RecordReader
from arcface_kd.data.views import are_degraded, draws_of, view_of
from benchmarks.drawn_records import draw_records
from benchmarks.record import Recorder, Row, print_table, print_verdict
from benchmarks.timing import interleaved_seconds

LEAST_SPEED_UP = 3.5
LEAST_SHARE_OF_QUALITY = 0.8
LARGEST_SHARE_OF_OPENING = 1 / 3
MEMORY_LIMIT_MB = 100.0
_WORKERS = 4
_BYTES_A_RECORD = 6000  # as in MS1MV2; the file is sparse
_PSS = "/proc/{}/smaps_rollup"


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        images: images read in a round, fewer where the records have fewer.
        rounds: rounds of reading that count.
        records: N of the index: MS1MV2's images, header and identity records.
        opening_rounds: rounds of opening that count.
    """

    images: int = 4096
    rounds: int = 5
    records: int = 5_908_396
    opening_rounds: int = 3


TINY = Sizes(images=12, rounds=1, records=1000, opening_rounds=1)


def import_mxnet() -> ModuleType | None:
    """The mxnet package, or None; it still wants ``numpy.bool``."""
    if "bool" not in vars(np):
        np.bool = bool  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import mxnet
        except ImportError:
            return None
    module: ModuleType = mxnet
    return module


def _faces(folder: Path, images: int) -> Path:
    """Real records where they are at hand, else drawn ones."""
    real = os.environ.get("ARCFACE_KD_REAL_DATA")
    if real is not None:
        return Path(real) / "faces_real"
    draw_records(folder, images)
    return folder


class _WithOurs(Dataset[int]):
    """Decodes images of this package's data set; hands on nothing, so that only reading is measured."""

    def __init__(self, faces: Path, chosen: list[int]) -> None:
        self.faces, self.chosen = RecordDataset(faces), chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, item: int) -> int:
        label, image = self.faces.pixels(View(self.chosen[item], False))
        assert image.shape == (112, 112, 3)
        return label


class _Degraded(_WithOurs):
    """The same, and degrades them as a worker of the loader does."""

    def __getitems__(self, items: list[int]) -> list[int]:
        draws = draws_of(items)
        degraded = are_degraded(draws, PRESETS["quality"])
        return [self._label(item, draws[at] if degraded[at] else None) for at, item in enumerate(items)]

    def _label(self, item: int, draws: NDArray[Any] | None) -> int:
        label, image = self.faces.pixels(View(self.chosen[item], False))
        if draws is not None:
            image, _ = view_of(image, draws, PRESETS["quality"], lambda share: image)
        assert image.shape == (112, 112, 3)
        return label


class _WithMxnet(Dataset[int]):
    """The same through mxnet, as arcface_torch's data set reads."""

    def __init__(self, mxnet: ModuleType, faces: Path, keys: list[int]) -> None:
        self.mxnet, self.keys = mxnet, keys
        self.records = mxnet.recordio.MXIndexedRecordIO(str(faces / "train.idx"), str(faces / "train.rec"), "r")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, item: int) -> int:
        header, payload = self.mxnet.recordio.unpack(self.records.read_idx(self.keys[item]))
        image = self.mxnet.image.imdecode(payload).asnumpy()
        assert image.shape == (112, 112, 3)
        return int(header.label if isinstance(header.label, float) else header.label[0])


def _start_worker(worker: int) -> None:
    import cv2

    # As in a worker of the package's loader.
    cv2.setNumThreads(0)


def _pass_of_a_worker(dataset: Dataset[int]) -> Callable[[], int]:
    loader = DataLoader(
        dataset, batch_size=64, num_workers=1, worker_init_fn=_start_worker, persistent_workers=True, collate_fn=sum
    )
    return lambda: sum(loader)


def write_index(folder: Path, records: int) -> tuple[Path, Path]:
    """A ``.rec`` that is all hole but for its last record, and the index of so many records.

    Returns:
        ``(rec, idx)``.
    """
    rec, idx = folder / "train.rec", folder / "train.idx"
    payload = bytes(64)
    with rec.open("wb") as stream:
        stream.seek((records - 1) * _BYTES_A_RECORD)
        stream.write(struct.pack("<II", 0xCED7230A, len(payload)) + payload)
    with idx.open("w", encoding="ascii") as stream:
        stream.writelines(f"{key}\t{key * _BYTES_A_RECORD}\n" for key in range(records))
    return rec, idx


def index_mb(rec: Path, idx: Path) -> float:
    """Memory of an open index in MB (1e6 bytes), shared by the process that opened it and four workers that use it.

    Proportional set sizes of five processes, in which each page is counted once, less those without an index.
    """
    measured = []
    for opened in (True, False):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            measured.append(process.submit(_shared_bytes, rec, idx, opened).result())
    return (measured[0] - measured[1]) / 1e6


def _shared_bytes(rec: Path, idx: Path, opened: bool) -> int:
    reader = RecordReader(rec, idx) if opened else None
    if reader is not None:
        # As a data set does when it opens: workers are made by a process that has looked a key up.
        reader.find(np.zeros(1, dtype=np.int64))
    context = multiprocessing.get_context("fork")
    chosen = np.array(random.Random(0).sample(range(_BYTES_A_RECORD), 1000))
    workers = []
    for _ in range(_WORKERS):
        ours, theirs = context.Pipe()
        worker = context.Process(target=_use, args=(reader, chosen, theirs), daemon=True)
        worker.start()
        workers.append((worker, ours))
    for _, pipe in workers:
        pipe.recv()
    total = sum(_proportional(pid) for pid in [os.getpid(), *(worker.pid or 0 for worker, _ in workers)])
    for worker, pipe in workers:
        pipe.send(None)
        worker.join()
    return total


def _use(reader: RecordReader | None, chosen: NDArray[np.int64], pipe: Connection) -> None:
    if reader is not None:
        keys = chosen * len(reader) // _BYTES_A_RECORD
        assert (reader.find(keys) == keys).all()
    pipe.send(None)
    pipe.recv()


def _proportional(pid: int) -> int:
    for line in Path(_PSS.format(pid)).read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_PSS.format(pid)} has no line Pss")


def run(sizes: Sizes, device: torch.device) -> list[Row]:
    """Measure, print the tables and the verdicts.

    Args:
        sizes: what to measure.
        device: named in the rows; reading and decoding happen on the CPU.

    Returns:
        The rows.
    """
    recorder = Recorder("loader", torch.device("cpu"))
    mxnet = import_mxnet()
    with tempfile.TemporaryDirectory() as folder:
        _measure_reading(recorder, sizes, mxnet, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        _measure_opening(recorder, sizes, mxnet, Path(folder))
    if mxnet is None:
        print("  mxnet is not installed here; nothing to compare with")
    return recorder.rows


def _measure_reading(recorder: Recorder, sizes: Sizes, mxnet: ModuleType | None, folder: Path) -> None:
    faces = _faces(folder, sizes.images)
    dataset = RecordDataset(faces)
    chosen = random.Random(0).sample(range(len(dataset)), min(sizes.images, len(dataset)))
    readers: dict[str, Dataset[int]] = {"arcface_kd": _WithOurs(faces, chosen), "quality": _Degraded(faces, chosen)}
    if mxnet is not None:
        readers["mxnet"] = _WithMxnet(mxnet, faces, [int(dataset.keys[index]) for index in chosen])
    providers = {name: _pass_of_a_worker(reader) for name, reader in readers.items()}
    if len({provider() for provider in providers.values()}) > 1:
        raise RuntimeError("the readers do not find the same labels")
    seconds = interleaved_seconds(providers, sizes.rounds, torch.device("cpu"))
    speed = {name: len(chosen) / value for name, value in seconds.items()}
    where = f"{'real' if faces != folder else 'drawn'} faces, one worker"
    for name, value in speed.items():
        recorder.add(name, where, "images_per_second", value)
    print_table(
        f"Reading and decoding, {where}",
        ("provider", "images/s"),
        [(name, f"{value:,.0f}") for name, value in speed.items()],
    )
    share = speed["quality"] / speed["arcface_kd"]
    print_verdict(
        f"quality at {LEAST_SHARE_OF_QUALITY} of that or more", f"{share:.2f}", share >= LEAST_SHARE_OF_QUALITY
    )
    if "mxnet" in speed:
        factor = speed["arcface_kd"] / speed["mxnet"]
        print_verdict(f"at least {LEAST_SPEED_UP} times mxnet's", f"{factor:.2f}", factor >= LEAST_SPEED_UP)


def _measure_opening(recorder: Recorder, sizes: Sizes, mxnet: ModuleType | None, folder: Path) -> None:
    rec, idx = write_index(folder, sizes.records)
    providers: dict[str, Callable[[], object]] = {"arcface_kd": lambda: RecordReader(rec, idx).close()}
    if mxnet is not None:
        recordio = mxnet.recordio
        providers["mxnet"] = lambda: recordio.MXIndexedRecordIO(str(idx), str(rec), "r").close()
    seconds = interleaved_seconds(providers, sizes.opening_rounds, torch.device("cpu"))
    where = f"N={sizes.records}"
    for name, value in seconds.items():
        recorder.add(name, where, "seconds", value)
    print_table(
        f"Opening an index of {sizes.records:,} records",
        ("provider", "seconds"),
        [(name, f"{value:.3f}") for name, value in seconds.items()],
    )
    if "mxnet" in seconds:
        share = seconds["arcface_kd"] / seconds["mxnet"]
        print_verdict("opened in under a third of mxnet's time", f"{share:.3f}", share < LARGEST_SHARE_OF_OPENING)
    if not Path(_PSS.format("self")).exists():
        print("  this system does not tell how much memory processes share")
        return
    megabytes = index_mb(rec, idx)
    recorder.add("arcface_kd", where, "index_mb", megabytes)
    print_verdict(
        f"held in at most {MEMORY_LIMIT_MB:.0f} MB by {_WORKERS} workers together",
        f"{megabytes:.1f} MB",
        megabytes <= MEMORY_LIMIT_MB,
    )
