"""The tensors of the stock transformers folder: codes four rows a byte, both scale conventions, the rest as it was stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.conversion.layers import packed_layers, quantized_layers
from qat.formats.dtypes import as_stored
from qat.formats.padding import Padding
from qat.formats.tensors import unique_tensors

ROWS_A_BYTE = 4


def stock_tensors(model: nn.Module, padding: Padding, linear_class: str, floats: str = "source") -> dict[str, Tensor]:
    """Everything that the file holds, by stock names; what is not quantized in the dtype `floats` (`qat.formats.dtypes`)."""
    tensors = float_tensors(model, padding, floats)
    own = as_stored(model, model.state_dict(), floats)
    for name, layer in packed_layers(model).items():
        scale = layer.weight_scale.detach().cpu().reshape(1)
        inverse = linear_class == "bitlinear"
        tensors[f"{name}.weight"] = pack_rows(padding.grow(name, layer.codes().cpu()))
        tensors[f"{name}.weight_scale"] = 1 / scale if inverse else scale.clone()
        if layer.bias is not None:
            bias = padding.grow_bias(name, own[f"{name}.bias"].cpu())
            tensors[f"{name}.bias"] = bias if inverse else (bias.double() / scale.double()).float()
        if layer.rms_norm is not None:
            tensors[f"{name}.rms_norm.weight"] = own[f"{name}.rms_norm.weight"].cpu()
    return tensors


def float_tensors(model: nn.Module, padding: Padding, floats: str = "source", meta: bool = False) -> dict[str, Tensor]:
    """All but the quantized layers' tensors, padded, in the dtype `floats`; `meta`: shapes only."""
    own = tuple(f"{name}." for name in quantized_layers(model))
    source = {k: v.to("meta") for k, v in model.state_dict().items()} if meta else as_stored(model, unique_tensors(model), floats)
    tensors = {}
    for key, tensor in source.items():
        if key.startswith(own):
            continue
        name, _, leaf = key.rpartition(".")
        grow = {"weight": padding.grow, "bias": padding.grow_bias}.get(leaf, lambda _, t: t)
        tensors[key] = grow(name, tensor).contiguous()
    return tensors


def pack_rows(codes: Tensor) -> Tensor:
    """Codes int8 [N, K] in {-1, 0, 1}, N a multiple of 4, as the stock bytes uint8 [N / 4, K]."""
    quarters = (codes + 1).to(torch.uint8).reshape(ROWS_A_BYTE, -1, codes.shape[1])
    packed = quarters[0].clone()
    for i in range(1, ROWS_A_BYTE):
        packed |= quarters[i] << 2 * i
    return packed
