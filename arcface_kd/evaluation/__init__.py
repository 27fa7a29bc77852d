"""Judging a model: verification of image pairs."""

from arcface_kd.evaluation.embedding import embed, normalize
from arcface_kd.evaluation.verification import VerificationResult, evaluate, verify

__all__ = ["VerificationResult", "embed", "evaluate", "normalize", "verify"]
