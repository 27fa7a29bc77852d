"""IR and IR-SE networks as one would write them down: operations over a state dict's tensors, by their numbers."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import conv2d, prelu


def _norm(x: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    shape = (1, -1) + (1,) * (x.dim() - 2)
    scaled = (x - state[f"{name}.running_mean"].view(shape)) / (state[f"{name}.running_var"].view(shape) + 1e-5).sqrt()
    if f"{name}.weight" in state:
        scaled = scaled * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)
    return scaled


def _gate(x: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    rows = []
    for image in x:
        hidden = (state[f"{name}.fc1.weight"][:, :, 0, 0] @ image.mean((1, 2))).clamp_min(0)
        gates = 1 / (1 + torch.exp(-(state[f"{name}.fc2.weight"][:, :, 0, 0] @ hidden)))
        rows.append(image * gates[:, None, None])
    return torch.stack(rows)


def ir_embeddings(state: Mapping[str, Tensor], images: Tensor, starts: set[int]) -> Tensor:
    """Embeddings (B, D) of a network whose tensors are called as the authors call them, not normalised.

    ``starts`` are the numbers of the units that halve the map, in their last convolution.
    """
    state = {name: tensor.double() for name, tensor in state.items()}
    x = conv2d(images.double(), state["input_layer.0.weight"], padding=1)
    x = prelu(_norm(x, state, "input_layer.1"), state["input_layer.2.weight"])
    for unit in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("body."))):
        stride = 2 if unit in starts else 1
        before, branch, name = x, x, f"body.{unit}.res_layer"
        layers = list(dict.fromkeys(re.findall(rf"{re.escape(name)}\.(\w+)\.", "\n".join(state))))
        last = max(
            int(layer)
            for layer in layers
            if layer.isdigit() and f"{name}.{layer}.weight" in state and state[f"{name}.{layer}.weight"].dim() == 4
        )
        for layer in layers:
            own = f"{name}.{layer}"
            if f"{own}.fc1.weight" in state:
                branch = _gate(branch, state, own)
            elif f"{own}.running_mean" in state:
                branch = _norm(branch, state, own)
            elif state[f"{own}.weight"].dim() == 4:
                kernel = state[f"{own}.weight"]
                branch = conv2d(branch, kernel, padding=kernel.shape[-1] // 2)
                # A strided convolution is the other one with what lies between left out.
                if int(layer) == last:
                    branch = branch[:, :, ::stride, ::stride]
            else:
                branch = prelu(branch, state[f"{own}.weight"])
        if f"body.{unit}.shortcut_layer.0.weight" in state:
            kernel = state[f"body.{unit}.shortcut_layer.0.weight"][:, :, 0, 0]
            before = torch.einsum("oc,bchw->bohw", kernel, before[:, :, ::stride, ::stride])
            before = _norm(before, state, f"body.{unit}.shortcut_layer.1")
        else:
            before = before[:, :, ::stride, ::stride]
        x = before + branch
    row = _norm(x, state, "output_layer.0").flatten(1)
    row = row @ state["output_layer.3.weight"].T + state["output_layer.3.bias"]
    return _norm(row, state, "output_layer.4")
