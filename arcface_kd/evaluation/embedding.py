"""Embed images for verification: the embeddings of an image and its mirror image, summed and L2-normalised."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn
from tqdm import tqdm

from arcface_kd.backbones.face_backbone import evaluating
from arcface_kd.errors import DataError

_MOST_READERS = 8


class FaceFiles(Protocol):
    """Faces that are read one by one, since all of them would not fit the memory."""

    @property
    def name(self) -> str:
        """What to call them."""
        ...

    @property
    def files(self) -> Sequence[str]:
        """The names of the N files."""
        ...

    def face(self, number: int) -> NDArray[Any]:
        """uint8 (3, 112, 112), RGB, of one of them."""
        ...


def normalize(embeddings: NDArray[Any]) -> NDArray[Any]:
    """Scale every row to length 1, in float64, with the same bits as scikit-learn's ``normalize``.

    Rows shorter than 10 machine epsilons (zero vectors) stay as they are.
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    norms[norms < 10 * np.finfo(np.float64).eps] = 1.0
    return cast("NDArray[Any]", rows / norms[:, None])


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def sum_of_views(model: nn.Module, images: Tensor, *, flip: bool = True, device: torch.device | None = None) -> Tensor:
    """Embed one batch: f(x) + f(mirrored x), or f(x) alone; (B, D) float64 on the CPU, not normalised.

    ``model``, in evaluation mode, gives (B, 3, H, W) float32 RGB images in [-1, 1] to (B, D) embeddings; a DataError
    says that it does not. ``images`` are uint8 RGB, B >= 1; ``device`` None is where the model's parameters are.
    """
    batch = ((images.to(_device_of(model) if device is None else device).float() / 255) - 0.5) / 0.5
    total: Tensor | None = None
    for view in (batch, batch.flip(-1)) if flip else (batch,):
        output = model(view)
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(batch):
            met = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise DataError(f"the model returned {met} for {len(batch)} images: wanted embeddings ({len(batch)}, D)")
        embeddings = output.float().cpu().double()
        total = embeddings if total is None else total + embeddings
    assert total is not None
    return total


def embed(
    model: nn.Module,
    images: Tensor,
    *,
    batch_size: int = 128,
    flip: bool = True,
    device: torch.device | str | None = None,
    dtype: DTypeLike = np.float32,
    progress: bool = False,
) -> NDArray[Any]:
    """Embed images as InsightFace's verification does: f(x) + f(mirrored x), then L2-normalised.

    The model is in evaluation mode meanwhile; afterwards every module is in the mode it was in. Sums and norms are
    float64. The last batch reaches back over earlier images to be as long as the others (as InsightFace's does), so
    that every batch runs through the same kernels.

    Args:
        model: (B, 3, H, W) float32 RGB images in [-1, 1] to (B, D) embeddings.
        images: (N, 3, H, W) uint8 RGB, N >= 1.
        batch_size: images a forward pass, at least 1.
        flip: add the embedding of the mirrored image.
        device: where the batches go, ``None`` for where the model's parameters are.
        dtype: type of the result; float64 keeps what float32 rounds off, which ``evaluate`` needs to agree with
            InsightFace to the last digit.
        progress: show a bar, on a terminal only.

    Returns:
        (N, D) array of ``dtype``; a zero embedding stays zero.

    Raises:
        DataError: images of another type or shape, or none; a model that does not return (B, D); a batch size below 1.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise DataError(
            f"images of shape {tuple(images.shape)} and type {images.dtype}: wanted (N, 3, H, W) of torch.uint8 with "
            "at least one image"
        )
    if batch_size < 1:
        raise DataError(f"batch size {batch_size}: wanted at least 1")
    target = None if device is None else torch.device(device)
    sums: NDArray[Any] | None = None
    with (
        evaluating(model),
        tqdm(
            total=len(images), unit="image", desc="embedding", disable=None if progress else True, dynamic_ncols=True
        ) as bar,
    ):
        for start in range(0, len(images), batch_size):
            stop = min(start + batch_size, len(images))
            batch = sum_of_views(model, images[max(0, stop - batch_size) : stop], flip=flip, device=target)
            if sums is None:
                sums = np.empty((len(images), batch.shape[1]))
            sums[start:stop] = batch[start - stop :].numpy()
            bar.update(stop - start)
    assert sums is not None
    return normalize(sums).astype(dtype, copy=False)


def _batches(faces: FaceFiles, batch_size: int) -> Iterator[Tensor]:
    """All faces in their order, uint8 (B, 3, 112, 112); the next batch is read while one is in use."""
    with ThreadPoolExecutor(min(_MOST_READERS, os.cpu_count() or 1)) as readers:

        def read(start: int) -> list[Future[NDArray[Any]]]:
            numbers = range(start, min(start + batch_size, len(faces.files)))
            return [readers.submit(faces.face, number) for number in numbers]

        ahead = read(0)
        for start in range(0, len(faces.files), batch_size):
            now, ahead = ahead, read(start + batch_size)
            yield torch.from_numpy(np.stack([face.result() for face in now]))


def embed_files(
    model: nn.Module,
    faces: FaceFiles,
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Iterator[NDArray[Any]]:
    """Read and embed faces batch by batch, each face as the sum of both views: (B, D) float64, not normalised.

    The rest is as in :func:`embed`. A DataError names a face that cannot be read, or an embedding that is not finite.
    """
    if batch_size < 1:
        raise DataError(f"batch size {batch_size}: wanted at least 1")
    where = None if device is None else torch.device(device)
    with (
        evaluating(model),
        tqdm(
            total=len(faces.files), unit="face", desc=faces.name, disable=None if progress else True, dynamic_ncols=True
        ) as bar,
    ):
        for batch in _batches(faces, batch_size):
            embeddings = sum_of_views(model, batch, device=where).numpy()
            bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
            if len(bad):
                raise DataError(
                    f"face {bar.n + bad[0]} is embedded as NaN or infinite: look for a diverged training or an "
                    "overflow in half precision"
                )
            yield embeddings
            bar.update(len(batch))
