"""Evaluation of a model: verification, identification, IJB, TinyFace, and the report that compares runs."""

from arcface_kd.evaluation.embedding import embed, normalize
from arcface_kd.evaluation.verification import VerificationResult, evaluate, verify

__all__ = ["VerificationResult", "embed", "evaluate", "normalize", "verify"]
