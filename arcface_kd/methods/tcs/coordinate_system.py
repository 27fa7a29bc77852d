r"""A linear coordinate system for a teacher's embeddings, folded into the student's last layer.

A point f of the teacher's space has the coordinates ``(f - mu) V``: mu is the mean of the teacher's embeddings, the
columns of V are orthonormal axes, the first k principal components as a rule. A student whose outputs are coordinates
stands at ``f_s = mu + V c_s``, and ``(f_s - mu) V`` is its output c_s again: whatever linear map leads from its
features to the teacher's space and from there into the system is one matrix with the last fully connected layer.

So the linear part is folded from the start. In the networks of arcface_torch a batch norm whose scale is not trained
follows the last layer. Here that scale is the teacher's standard deviation along each axis, and the offset is zero: the
student's coordinates have the teacher's mean (mu is the origin) and the teacher's variances, by construction, and
everything is kept under the keys that a plain network has. Where the system has fewer axes than the student outputs,
the scale of the other outputs is zero, and so are they: cosines are those of the coordinates.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from arcface_kd.backbones.face_backbone import evaluating
from arcface_kd.errors import ConfigError
from arcface_kd.teachers.cache.principal_components import PrincipalComponents

Basis = Literal["pca", "random"]

_IMAGE_SIZE = 112


class CoordinateSystem(NamedTuple):
    """Axes in a teacher's space."""

    mean: Tensor  # (Dt,) fp32, the origin
    axes: Tensor  # (k, Dt) fp32, orthonormal: the columns of V as rows
    deviations: Tensor  # (k,) fp32, standard deviations of the teacher's embeddings along the axes, above 0
    explained: float  # share of the teacher's variance that the axes hold, in (0, 1]


def choose_axes(
    components: PrincipalComponents,
    largest: int,
    *,
    basis: Basis = "pca",
    variance: float = 0.6,
    dimension: int | None = None,
    seed: int = 0,
) -> CoordinateSystem:
    """Choose a system of coordinates, the same on every rank, of at most ``largest`` axes.

    ``pca`` takes the principal components of largest variance: as few as hold more than ``variance`` of it, or
    ``dimension`` of them. ``random`` takes as many orthonormal directions, drawn by the seed, of the same origin.
    """
    rank = components.rank
    if dimension is not None and dimension > min(largest, rank):
        what = "the student's embedding_size" if largest < rank else "the number of axes the teacher's embeddings span"
        raise ConfigError(f"dimension is {dimension}; it must be at most {min(largest, rank)}, {what}")
    count = min(components.axes_for(variance), largest) if dimension is None else dimension
    axes, variances = components.axes[:count], components.variances[:count]
    if basis == "random":
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(len(components.mean), count, generator=generator, dtype=torch.float64)
        axes = torch.linalg.qr(drawn).Q.T
        variances = (axes @ components.axes.T).square() @ components.variances
    share = float(variances.sum() / components.variances.sum())
    return CoordinateSystem(components.mean.float(), axes.float().contiguous(), variances.sqrt().float(), share)


def embedding_norm(student: nn.Module) -> nn.BatchNorm1d:
    """The batch norm whose output is the student's embedding.

    The student is shown two images in evaluation mode, which changes nothing.
    """
    found = [module for module in student.modules() if isinstance(module, nn.BatchNorm1d)]
    name = type(student).__name__
    if not found or not _is_output(student, found[-1]):
        raise ConfigError(
            f"the student {name} does not end in a batch norm, which a system of coordinates is put into: take one of "
            "arcface_torch's networks, such as r18 or mbf"
        )
    if not found[-1].affine:
        raise ConfigError(
            f"the batch norm that ends the student {name} has no scale, which a system of coordinates is put into: "
            "take another network, such as mbf"
        )
    return found[-1]


def _is_output(student: nn.Module, norm: nn.BatchNorm1d) -> bool:
    """Whether a student gives out what its batch norm does."""
    seen: list[Tensor] = []
    handle = norm.register_forward_hook(lambda module, given, output: seen.append(output))
    weight = next(student.parameters())
    try:
        with evaluating(student):
            output = student(torch.zeros(2, 3, _IMAGE_SIZE, _IMAGE_SIZE, device=weight.device, dtype=weight.dtype))
    finally:
        handle.remove()
    return len(seen) == 1 and isinstance(output, Tensor) and torch.equal(seen[0], output)


def set_scale(norm: nn.BatchNorm1d, scale: Tensor) -> None:
    """Write the scale (D,) of a student's last batch norm, and zero as its offset."""
    # By `data`, since a step's backward pass may still hold the scale; only outputs that get no gradient are changed
    # between the two.
    norm.weight.data.copy_(scale)
    norm.bias.data.zero_()
