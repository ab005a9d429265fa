"""The three projections of a layer's attention, found by what they take: three linear layers of one module that get one input.

Queries, keys and values need not be told apart, as the attention relation is a sum over the three. Names would not do: q_proj,
query, wq, W_Q. A fused projection, or one through a low rank, is not found, and refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.losses.layers import find_layers, small_run


def find_projections(model: nn.Module, layer: int) -> list[nn.Module]:
    """Queries', keys' and values' projections of layer `layer` (-1 is the last), in the order of their calls.

    Raises:
        ValueError: there is no such layer, or it has no three projections.
    """
    layers = find_layers(model).modules
    if not -len(layers) <= layer < len(layers):
        raise ValueError(
            f"distill.relation_layer={layer} is not allowed; {type(model).__name__} has layers 0 to {len(layers) - 1}"
            f" (or -{len(layers)} to -1, from the last)"
        )
    taken = _inputs(model, layers[layer])
    for parent in layers[layer].modules():
        children = [child for child in parent.children() if child in taken]
        for leader in children:
            same = [child for child in children if torch.equal(taken[child], taken[leader])]
            if len(same) == 3 and len(children) > 3:  # with the projection of their output; an MLP has no fourth
                return same
    raise ValueError(
        f"distill.relation compares queries, keys and values, but no three projections of one input can be told in layer {layer}"
        f" of {type(model).__name__} (fused or low-rank projections are not supported); set distill.relation=0"
    )


def _inputs(model: nn.Module, layer: nn.Module) -> dict[nn.Module, Tensor]:
    """Module with a matrix for its weight -> its first input, in a small run."""
    taken: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any) -> None:
        taken[module] = args[0].clone()

    linear = [one for one in layer.modules() if isinstance(w := getattr(one, "weight", None), Tensor) and w.ndim == 2]
    handles = [one.register_forward_pre_hook(keep) for one in linear]
    try:
        small_run(model)
    finally:
        for handle in handles:
            handle.remove()
    return taken
