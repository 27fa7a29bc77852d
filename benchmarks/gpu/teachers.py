"""Checks 6 and 10: an ONNX teacher on the GPU, and a cache of embeddings."""

import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from easydict import EasyDict
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from arcface_kd.data.dataset import open_dataset
from arcface_kd.data.fingerprint import fingerprint
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache, identity_of
from arcface_kd.teachers.cache.fill import fill_cache
from benchmarks.gpu.checks import Findings, Place
from benchmarks.gpu.inputs import DIMENSION, IMAGES_EACH, config_of, network, records, teacher_file
from benchmarks.gpu.processes import new_process

# Of unit vectors, an entry: fp16 rounds to 2^-11 in each layer.
_TOLERANCE = {"fp32": 2e-3, "fp16": 5e-3}


def _images(folder: Path, count: int) -> Tensor:
    faces = open_dataset(folder)
    return torch.stack([faces[index % len(faces)].image for index in range(count)]).float() / 127.5 - 1


def onnx(place: Place, found: Findings) -> None:
    """Embeddings on the device against onnxruntime's on the CPU, and milliseconds of a batch."""
    import onnxruntime

    name, dimension, batch = ("thin_r18", 16, 8) if place.tiny else ("r50", DIMENSION, 128)
    folder = records(place, 4 if place.tiny else 100)
    path = place.scratch / f"{name}.onnx"
    with warnings.catch_warnings():
        # The older exporter: the newer one needs onnxscript, which a bare machine does not have.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network(name, dimension, folder),
            (torch.zeros(2, 3, 112, 112),),
            str(path),
            dynamo=False,
            input_names=["data"],
            output_names=["embedding"],
            dynamic_axes={"data": {0: "batch"}, "embedding": {0: "batch"}},
        )
    images = _images(folder, batch)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    began = time.perf_counter()
    (told,) = session.run(None, {"data": images.numpy()})
    found.add("onnxruntime on the CPU, ms a batch", 1000 * (time.perf_counter() - began))
    expected = normalize(torch.from_numpy(told))
    on_device = images.to(place.device)
    for precision in ("fp32", "fp16"):
        teacher = load_teacher(path, {"precision": precision})
        met = teacher(on_device)
        difference = float((normalize(met.float()).cpu() - expected).abs().max())
        found.add(f"{precision}: largest difference", difference)
        found.expect(difference < _TOLERANCE[precision], f"{precision}: embeddings differ by {difference:.1e}")
        found.expect(met.device.type == place.device.type, f"{precision}: embeddings are on {met.device}")
        found.add(f"{precision}: milliseconds a batch of {batch}", _milliseconds(teacher, on_device))
    chosen = load_teacher(path)
    found.add("run by", type(chosen.network).__name__)
    found.add("precision by default", chosen.precision)
    if place.device.type == "cuda":
        slowest = 40.0
        met_ms = _milliseconds(chosen, on_device)
        found.add(f"by default: milliseconds a batch of {batch}", met_ms)
        found.expect(met_ms < slowest, f"a batch takes {met_ms:.0f} ms: the graph is not run on the GPU")


def _milliseconds(teacher: Any, images: Tensor) -> float:
    times = []
    for _ in range(5 if images.is_cuda else 2):
        began = time.perf_counter()
        # The sum waits for the device.
        float(teacher(images).sum())
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


def cache(place: Place, found: Findings) -> None:
    """A cache that was killed while it was filled, filled by a second run; its rows against the teacher on the CPU."""
    name, dimension, identities, batch = ("thin_r18", 16, 4, 8) if place.tiny else ("r50", DIMENSION, 256, 128)
    folder = records(place, identities)
    path = place.scratch / "killed.rows"
    config = config_of(
        folder,
        place.scratch / "fill",
        identities,
        kd_cache=str(path),
        kd_teacher=str(teacher_file(place, name, dimension, folder)),
        batch_size=batch,
        num_workers=0 if place.tiny else 4,
    )
    process = new_process(place, _fill_and_die, dict(config), inside=True)
    process.start()
    process.join()
    found.expect(process.exitcode == -signal.SIGKILL, f"the first run ended with {process.exitcode}, not by its kill")
    report = fill_cache(config)
    total = 2 * identities * IMAGES_EACH
    found.add("rows", total)
    found.add("rows that the second run found missing", report.missing)
    found.add("images/s, two views of each", report.images_per_second)
    found.expect(0 < report.missing < total, f"the second run found {report.missing} of {total} rows missing")
    again = fill_cache(config)
    found.expect(again.missing == 0, f"a third run found {again.missing} rows missing")
    faces = open_dataset(folder)
    rows = EmbeddingCache(path, identity_of(load_teacher(config.kd_teacher), fingerprint(faces), len(faces)))
    teacher = load_teacher(config.kd_teacher, {"precision": "fp32"}).to("cpu")
    count = min(len(faces), 32)
    images = _images(folder, count)
    for flipped in (False, True):
        met, known = rows.look_up(torch.arange(count), torch.full((count,), flipped))
        expected = normalize(teacher(images.flip(3) if flipped else images))
        difference = float((met - expected).abs().max())
        found.add(f"largest difference from the CPU, {'mirrored' if flipped else 'plain'}", difference)
        found.expect(bool(known.all()) and difference < _TOLERANCE["fp16"], f"rows differ by {difference:.1e}")


def _fill_and_die(config: dict[str, Any]) -> None:
    """Fill a cache, and be killed after the third batch of rows."""
    # The bar's usual lock would stay behind.
    tqdm.set_lock(threading.RLock())
    store, calls = EmbeddingCache.store, iter((1, 2, 3))

    def store_or_die(*arguments: Any) -> None:
        store(*arguments)
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(EmbeddingCache, "store", store_or_die):
        fill_cache(EasyDict(config))
