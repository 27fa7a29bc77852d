"""One identity, modelled and painted as far as no single image decides it."""

import numpy as np

from arcface_kd.data.synthetic_faces.canvas import Bytes
from arcface_kd.data.synthetic_faces.features import Expression, paint_features
from arcface_kd.data.synthetic_faces.head import paint_head
from arcface_kd.data.synthetic_faces.relief import Relief, build_relief
from arcface_kd.data.synthetic_faces.traits import Identity, draw_identity

_HAIRS_A_BROW = 14


class Portrait:
    """Albedo and relief of one identity, whose generator decides traits and texture."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.identity: Identity = draw_identity(rng)
        self.relief: Relief = build_relief(self.identity)
        self._brow_hairs = rng.uniform(-1, 1, (2, _HAIRS_A_BROW, 2)).astype(np.float32)
        self._head = paint_head(self.identity, rng)

    def paint(self, expression: Expression) -> Bytes:
        """Paint the face from the front, in even light; alpha is 0 where there is neither head nor hair."""
        canvas = self._head.copy()
        paint_features(canvas, self.identity, expression, self._brow_hairs)
        return canvas
