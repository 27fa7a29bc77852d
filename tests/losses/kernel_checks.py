"""Checks of the Triton kernels without a GPU, for a process of its own: Triton decides at its import how it runs them.

``python -m tests.losses.kernel_checks interpret`` runs them in Triton's interpreter, beside torch's own operations;
``compile`` makes machine code for three generations of GPUs.
"""

import importlib
import sys
from typing import Any

import torch

from arcface_kd.losses import angle_sums, fused, narrow_products
from arcface_kd.losses.embedding_losses import inner_products
from arcface_kd.losses.narrow_products import WEIGHT_SCALE, RunningSoftmax

ARCHITECTURES = (75, 80, 90)


def chunks_are_those_of_torch() -> None:
    """Three chunks one after the other: targets in each, a row without one, a row of nothing but its target."""
    for threshold in (0.0, 10.0):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            torch.manual_seed(0)
            batch, classes = 6, 300
            met, wanted = (RunningSoftmax.none(torch.empty(batch, 1)) for _ in range(2))
            position = torch.tensor([-1, 5, 299, 300, 599, 0])
            for first in (0, classes, 2 * classes):
                logits = torch.randn(batch, classes) * 20
                logits[5] = -torch.inf
                weights = torch.empty(batch, classes, dtype=dtype)
                twin = torch.empty_like(weights)
                narrow_products._add_chunk(logits.clone(), twin, position, first, threshold, wanted)
                narrow_products.kernel()[(batch,)](
                    *(logits, weights, position, *met, classes, first, threshold, WEIGHT_SCALE),
                    FILTERS=threshold > 0,
                    BLOCK=128,
                )
                torch.testing.assert_close(weights, twin, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-3)
                for a, b in zip(met, wanted, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert (met.total[:5] > 0).all()


def angles_are_those_of_torch() -> None:
    """Tiles that the batch does not fill, two rows at one point, vertices that begin in the middle."""
    rows, vertices = 70, slice(3, 20)
    embeddings = torch.randn(rows, 8)
    embeddings[1] = embeddings[0]
    student, teacher = inner_products(embeddings), inner_products(torch.randn(rows, 9))
    sides = [angle_sums._side(gram, vertices.start, vertices.stop) for gram in (student, teacher)]
    wanted = angle_sums._angle_sums(*sides)
    loss, of_rows, over_vertices = torch.zeros(1), torch.zeros(2, 17, rows), torch.empty(rows, rows)
    angle_sums.kernel()[(3, 2)](
        *(student, teacher, sides[0].near, sides[1].near, sides[0].inverse, sides[1].inverse),
        *(over_vertices, of_rows[0], of_rows[1], loss, 17, rows),
        ROWS=32,
        COLUMNS=64,
    )
    met = (loss[0], over_vertices, of_rows[0], of_rows[1])
    for a, b in zip(met, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def kernels_compile() -> None:
    """To machine code, by the compiler that a run on a GPU calls."""
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget
    cases: list[tuple[Any, dict[str, str], dict[str, int]]] = [
        (fused._probe_by_kernel(triton), {"values": "*fp32"}, {})
    ]
    numbers = dict.fromkeys(angle_sums.kernel().arg_names[:10], "*fp32")
    cases += [(angle_sums.kernel(), {**numbers, "vertices": "i32", "batch": "i32"}, {"ROWS": 32, "COLUMNS": 64})]
    for narrow in ("*fp16", "*bf16", "*fp32"):
        signature = {"logits": "*fp32", "weights": narrow, "position": "*i64", "shift": "*fp32", "total": "*fp32"}
        signature |= {"fade": "*fp32", "classes": "i32", "first": "i32", "threshold": "fp32", "scale": "fp32"}
        cases += [(narrow_products.kernel(), signature, {"FILTERS": on, "BLOCK": 1024}) for on in (False, True)]
    for kernel, signature, constants in cases:
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = compiler.ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), places)
        for architecture in ARCHITECTURES:
            assert triton.compile(source, target=target("cuda", architecture, 32)).asm["cubin"]


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        chunks_are_those_of_torch()
        angles_are_those_of_torch()
    else:
        kernels_compile()
    print("good")
