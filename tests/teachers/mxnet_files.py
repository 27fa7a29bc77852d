"""MXNet checkpoints written without mxnet, for the tests to break."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_KINDS = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}


def array_bytes(array: np.ndarray, version: int = 2) -> bytes:
    """One array: version 0 is the oldest, without a magic number."""
    shape = array.shape
    if version == 0:
        start = struct.pack(f"<I{len(shape)}I", len(shape), *shape)
    else:
        start = struct.pack("<I", 0xF993FAC7 + version)
        start += struct.pack("<i", 0) if version > 1 else b""
        start += struct.pack(f"<I{len(shape)}q", len(shape), *shape)
    return start + struct.pack("<iii", 1, 0, _KINDS[str(array.dtype)]) + array.tobytes()


def params_bytes(arrays: Mapping[str, np.ndarray], version: int = 2) -> bytes:
    """A whole ``.params`` file."""
    parts = [struct.pack("<QQQ", 0x112, 0, len(arrays))]
    parts += [array_bytes(array, version) for array in arrays.values()]
    parts.append(struct.pack("<Q", len(arrays)))
    parts += [struct.pack("<Q", len(name)) + name.encode() for name in arrays]
    return b"".join(parts)


def symbol(
    nodes: Sequence[tuple[str, str, Mapping[str, object], Sequence[str]]], head: str | None = None
) -> dict[str, Any]:
    """A symbol of (operator, name, attributes, names of inputs); variables are made where they are first named."""
    numbers: dict[str, int] = {}
    entries: list[dict[str, Any]] = []
    for operator, name, attributes, inputs in nodes:
        for origin in inputs:
            if origin not in numbers:
                numbers[origin] = len(entries)
                entries.append({"op": "null", "name": origin, "inputs": []})
        numbers[name] = len(entries)
        entries.append(
            {
                "op": operator,
                "name": name,
                "attrs": {key: str(value) for key, value in attributes.items()},
                "inputs": [[numbers[origin], 0, 0] for origin in inputs],
            }
        )
    return {
        "nodes": entries,
        "arg_nodes": [number for number, entry in enumerate(entries) if entry["op"] == "null"],
        "heads": [[numbers[head or nodes[-1][1]], 0, 0]],
        "attrs": {"mxnet_version": ["int", 10000]},
    }


def face_nodes(size: int = 16) -> list[tuple[str, str, Mapping[str, object], Sequence[str]]]:
    """A small InsightFace network: its own normalisation, a residual, fc1 and a loss behind it."""
    block: Mapping[str, object] = {"kernel": "(3, 3)", "num_filter": 8, "pad": "(1, 1)", "no_bias": True}
    norm = {"eps": 2e-5, "momentum": 0.9}
    return [
        ("_minus_scalar", "_minusscalar0", {"scalar": 127.5}, ["data"]),
        ("_mul_scalar", "_mulscalar0", {"scalar": 0.0078125}, ["_minusscalar0"]),
        ("Convolution", "conv0", {**block, "stride": "(4, 4)"}, ["_mulscalar0", "conv0_weight"]),
        ("BatchNorm", "bn0", {**norm, "fix_gamma": False}, ["conv0", "bn0_gamma", "bn0_beta", "bn0_mean", "bn0_var"]),
        ("LeakyReLU", "relu0", {"act_type": "prelu"}, ["bn0", "relu0_gamma"]),
        ("Convolution", "conv1", {**block, "num_group": 8}, ["relu0", "conv1_weight"]),
        ("elemwise_add", "_plus0", {}, ["conv1", "relu0"]),
        ("Pooling", "pool0", {"kernel": "(7, 7)", "stride": "(7, 7)", "pool_type": "avg"}, ["_plus0"]),
        ("Dropout", "drop0", {"p": 0.4}, ["pool0"]),
        ("FullyConnected", "pre_fc1", {"num_hidden": size}, ["drop0", "pre_fc1_weight", "pre_fc1_bias"]),
        ("BatchNorm", "fc1", {**norm, "fix_gamma": True}, ["pre_fc1", "fc1_gamma", "fc1_beta", "fc1_mean", "fc1_var"]),
        ("FullyConnected", "fc7", {"num_hidden": 3, "no_bias": True}, ["fc1", "fc7_weight"]),
        ("SoftmaxOutput", "softmax", {}, ["fc7", "softmax_label"]),
    ]


def face_arrays(size: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays for `face_nodes`; the gamma that is fixed is not 1 in the file, as MXNet leaves it."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (generator.standard_normal(shape) * 0.3).astype(np.float32)

    def positive(*shape: int) -> np.ndarray:
        return generator.uniform(0.5, 1.5, shape).astype(np.float32)

    shapes = {"conv0_weight": (8, 3, 3, 3), "conv1_weight": (8, 1, 3, 3), "pre_fc1_weight": (size, 8 * 4 * 4)}
    shapes |= {"pre_fc1_bias": (size,), "bn0_beta": (8,), "fc1_beta": (size,)}
    return {
        **{f"arg:{name}": normal(*shape) for name, shape in shapes.items()},
        **{"aux:bn0_mean": normal(8), "aux:fc1_mean": normal(size)},
        **{"arg:bn0_gamma": positive(8), "arg:relu0_gamma": positive(8), "arg:fc1_gamma": positive(size)},
        **{"aux:bn0_var": positive(8), "aux:fc1_var": positive(size)},
    }


def write_checkpoint(
    folder: Path,
    nodes: Sequence[tuple[str, str, Mapping[str, object], Sequence[str]]] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
    *,
    prefix: str = "model",
    epoch: int = 0,
) -> Path:
    """Both files of a checkpoint; returns their prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{prefix}-symbol.json").write_text(json.dumps(symbol(nodes or face_nodes())))
    content = params_bytes(arrays if arrays is not None else face_arrays())
    (folder / f"{prefix}-{epoch:04d}.params").write_bytes(content)
    return folder / prefix
