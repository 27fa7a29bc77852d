"""Synthetic identities by number: the same seed, identity and image always give the same pixels."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from arcface_kd.data.synthetic_faces.photograph import photograph
from arcface_kd.data.synthetic_faces.portrait import Portrait

_IDENTITY_STREAM, _IMAGE_STREAM = 0, 1
_PORTRAITS_KEPT = 32
"""About a megabyte each; more than one so that pairs of identities do not model them again and again."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep OpenCV from sharing out work on images so small that waking a thread costs more than it saves."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


class SyntheticFaces:
    """Faces of people who do not exist, drawn by this package; free of any licence.

    Identities and images are numbered without end. Each has a random stream of its own, keyed by its numbers, so an
    image does not depend on what was drawn before it.

    Args:
        seed: of the population, not negative.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._portrait = lru_cache(maxsize=_PORTRAITS_KEPT)(self._draw_portrait)

    def _stream(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=key)))

    def _draw_portrait(self, identity: int) -> Portrait:
        return Portrait(self._stream(_IDENTITY_STREAM, identity))

    def jpeg(self, identity: int, index: int) -> bytes:
        """One image of a person as a JPEG file; its quality varies from image to image."""
        with _one_thread():
            pixels, quality = photograph(self._portrait(identity), self._stream(_IMAGE_STREAM, identity, index))
        done, encoded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        assert done, "OpenCV has a JPEG encoder and an image in memory cannot fail"
        return encoded.tobytes()

    def image(self, identity: int, index: int) -> NDArray[np.uint8]:
        """The pixels of :meth:`jpeg`: uint8 (112, 112, 3), RGB, aligned to the ArcFace template."""
        encoded = np.frombuffer(self.jpeg(identity, index), np.uint8)
        return np.ascontiguousarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1])
