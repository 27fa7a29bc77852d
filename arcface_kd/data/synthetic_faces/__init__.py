"""Licence-free faces: synthetic identities drawn by our own code, for demos and tests.

A person is a set of traits (:mod:`.traits`) that becomes a painted albedo (:mod:`.head`, :mod:`.features`) over a
height map (:mod:`.relief`); a photograph (:mod:`.photograph`) poses, aligns and lights it and passes it through a
camera. Nothing here is a real face or was learned from one.

Importing this package imports OpenCV.
"""

from arcface_kd.data.synthetic_faces.face_dataset import write_dataset
from arcface_kd.data.synthetic_faces.faces import SyntheticFaces

__all__ = ["SyntheticFaces", "write_dataset"]
