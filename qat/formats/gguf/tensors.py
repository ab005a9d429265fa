"""The tensors of a GGUF file: which block type each layer gets and why, and the bytes.

Every ternary or binary layer has its scales in the blocks, as float16. Scales that float16 cannot hold are rounded (training with
`quant.scale_dtype=float16` avoids that), and refused where rounding would cost more than float16's half unit, which is where its
range ends. A group of weights with one scale must consist of whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from qat.conversion.layers import packed_layers
from qat.formats.bitnet.tensors import float_tensors
from qat.formats.gguf import i2s as gguf_i2s
from qat.formats.gguf.architectures import Architecture, Names, rope_factors
from qat.formats.gguf.blocks import BLOCKS, encode
from qat.formats.gguf.container import Tensor, block_size
from qat.formats.llamacpp import ggml
from qat.formats.padding import Padding
from qat.nn.packed import PackedBitLinear

I2S = {"i2_s": "x86", "i2_s_arm": "arm"}
TYPES = ("auto", *BLOCKS, *I2S)
FLOATS = {"f32": 0, "f16": 1, "q8_0": 8, "q6_k": 14, "bf16": 30}
_AUTO = ("q1_0", "tq2_0", "q2_0")  # the first that fits: binary in one bit; blocks of 256 have fast kernels; 64 fits most widths
_HALF_UNIT = 2.0**-11


@dataclass(frozen=True)
class Source:
    """One tensor as the file is to hold it: codes t [N, K] and scales [1 | N, 1 | G], or values."""

    name: str
    codes: NDArray[np.int8] | None = None
    scale: NDArray[np.float32] | None = None
    values: NDArray[np.float32] | None = None

    @property
    def group(self) -> int:
        """Weights a scale, along K."""
        assert self.codes is not None and self.scale is not None
        return self.codes.shape[1] // self.scale.shape[1]

    def half_scale(self) -> NDArray[np.float16]:
        """The scales in float16.

        Raises:
            ValueError: one is outside of float16's normal range.
        """
        assert self.scale is not None
        with np.errstate(over="ignore"):
            half = self.scale.astype(np.float16)
        if self.rounding(half) > _HALF_UNIT:
            worst = self.scale.flat[int(np.abs(half.astype(np.float64) / self.scale - 1).argmax())]
            raise ValueError(f"{self.name} has the scale {worst:.3g}, which float16 cannot hold")
        return half

    def rounding(self, half: NDArray[np.float16]) -> float:
        """The largest relative change of a scale by rounding."""
        assert self.scale is not None
        return float(np.abs(half.astype(np.float64) / self.scale - 1).max())


def width_multiple(requested: str) -> int:
    """Of what the MLP width must be a multiple."""
    if requested in I2S:
        return 4 * gguf_i2s.STRIDES[I2S[requested]]
    return 64 if requested == "auto" else BLOCKS[requested].weights


def sources(model: nn.Module, config: Any, found: Architecture, padding: Padding) -> Iterator[Source]:
    """Every tensor of the file, in the model's order.

    Raises:
        ValueError: llama.cpp's model of this architecture has no place for a tensor.
    """
    names = Names(found, config.num_hidden_layers)
    for key, value in float_tensors(model, padding).items():
        yield Source(names[key], values=_values(model, config, found, key, value.float()))
    layers = packed_layers(model)
    for name, layer in layers.items():
        yield _quantized(name, layer, config, found, padding, names)
        if layer.bias is not None:
            bias = padding.grow_bias(name, layer.bias.detach().cpu())
            yield Source(names[f"{name}.bias"], values=_ordered(bias, found.row_order(name, len(bias), config)))
    if found.head == "own" and config.tie_word_embeddings and "lm_head" not in layers:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        yield Source("output.weight", values=_ordered(embedding.weight.detach().cpu(), None))
    factors = rope_factors(config)
    if factors is not None:
        yield Source("rope_freqs.weight", values=factors.numpy())


def _values(model: nn.Module, config: Any, found: Architecture, key: str, value: torch.Tensor) -> NDArray[np.float32]:
    module, _, leaf = key.rpartition(".")
    if type(model.get_submodule(module)).__name__ == "Conv1D" and leaf == "weight":
        value = value.T
    if found.norm_offset and module.endswith("norm"):
        value = value + found.norm_offset
    return _ordered(value, found.row_order(module, len(value), config))


def _ordered(value: torch.Tensor, order: torch.Tensor | None) -> NDArray[np.float32]:
    return (value if order is None else value[order]).float().contiguous().numpy()


def _quantized(name: str, layer: PackedBitLinear, config: Any, found: Architecture, padding: Padding, names: Names) -> Source:
    codes = padding.grow(name, layer.codes().cpu())
    scale = layer.weight_scale.detach().cpu().float()
    if len(scale) > 1:
        scale = F.pad(scale, (0, 0, 0, len(codes) - len(scale)), value=float(scale.min()))
    order = found.row_order(name, len(codes), config)
    if order is not None:
        codes, scale = codes[order], scale[order] if len(scale) > 1 else scale
    return Source(names[f"{name}.weight"], codes.contiguous().numpy(), scale.contiguous().numpy())


def choose(source: Source, requested: str) -> tuple[str, str]:
    """The type of a quantized tensor, and the reason in words.

    Raises:
        ValueError: the requested type, or every type, does not fit; the reason is named.
    """
    assert source.codes is not None
    if requested in I2S:
        return _choose_i2s(source, requested)
    reasons = {name: _misfit(source, name) for name in (_AUTO if requested == "auto" else (requested,))}
    fitting = [name for name, reason in reasons.items() if reason is None]
    if not fitting:
        what = "any type" if requested == "auto" else requested
        raise ValueError(f"{source.name} does not fit {what}: {'; '.join(map(str, reasons.values()))}")
    if requested != "auto":
        return requested, "asked for"
    chosen, width = fitting[0], source.codes.shape[1]
    if chosen == "q2_0":
        return chosen, f"only blocks of 64 fit ({_padded_binary(source) or reasons['tq2_0']})"
    why = {"q1_0": f"binary, and rows of {width} are whole blocks of 128", "tq2_0": f"rows of {width} are whole blocks of 256"}
    return chosen, why[chosen]


def _padded_binary(source: Source) -> str | None:
    """Binary weights of which whole rows or columns are zeros, as a padded MLP has them."""
    assert source.codes is not None
    rows, columns = source.codes.any(1), source.codes.any(0)
    padded = not (rows.all() and columns.all())
    return "binary, padded with zeros, which q1_0 has not" if padded and source.codes[rows][:, columns].all() else None


def _misfit(source: Source, name: str) -> str | None:
    assert source.codes is not None and source.scale is not None
    weights, (_, width) = BLOCKS[name].weights, source.codes.shape
    if width % weights:
        return f"rows of {width} are no multiple of {weights}"
    if source.scale.shape[1] > 1 and source.group % weights:
        return f"groups of {source.group} with a scale each are no multiple of {weights}"
    if name == "q1_0" and (source.codes == 0).any():
        return "q1_0 holds no zero weights"
    return None


def _choose_i2s(source: Source, requested: str) -> tuple[str, str]:
    assert source.codes is not None and source.scale is not None
    if source.scale.size > 1:
        raise ValueError(f"{source.name} does not fit {requested}: it has {source.scale.size} scales, and the type one a tensor")
    gguf_i2s.check_width(source.codes.shape[1], I2S[requested])
    return requested, "asked for"


def to_tensor(source: Source, kind: str) -> Tensor:
    """The bytes of a source: `kind` is a block type for codes, one of FLOATS for values."""
    if source.values is not None:
        return _float_tensor(source, kind)
    assert source.codes is not None and source.scale is not None
    shape = source.codes.shape
    if kind in I2S:
        data = gguf_i2s.encode(source.codes, float(source.scale.item()), I2S[kind])
        return Tensor(shape, gguf_i2s.NUMBER, data)
    per_row = shape[1] // BLOCKS[kind].weights
    half = source.half_scale()
    d = np.broadcast_to(np.repeat(half, per_row // half.shape[1], axis=1), (shape[0], per_row))
    return Tensor(shape, BLOCKS[kind].number, encode(source.codes, d, kind).reshape(-1))


def float_kind(source: Source, requested: str) -> str:
    """Vectors, and positions, as every llama.cpp converter writes them, in float32; matrices as asked for."""
    assert source.values is not None
    return "f32" if source.values.ndim == 1 or source.name == "position_embd.weight" else requested


def _float_tensor(source: Source, kind: str) -> Tensor:
    values = source.values
    assert values is not None
    number, size = FLOATS[kind], block_size(FLOATS[kind])
    assert size is not None
    if values.shape[-1] % size[0]:
        raise ValueError(
            f"{source.name} has rows of {values.shape[-1]}, no multiple of the {size[0]} of {kind}; choose f16 or q8_0"
        )
    with np.errstate(over="ignore"):
        data = ggml.quantize(values, number) if kind == "q6_k" else _quantize(values, number)
    if kind == "f16" and not np.isfinite(data.view(np.float16)).all():
        raise ValueError(f"{source.name} has values beyond float16's range; choose bf16 or f32")
    return Tensor(values.shape, number, data.reshape(-1))


def _quantize(values: NDArray[np.float32], number: int) -> NDArray[np.uint8]:
    from gguf import GGMLQuantizationType, quants

    return np.ascontiguousarray(quants.quantize(values, GGMLQuantizationType(number))).reshape(-1).view(np.uint8)


def summary(choices: Mapping[str, tuple[str, str]]) -> list[str]:
    """One line a type and reason, with how many tensors it was."""
    counted: dict[tuple[str, str], int] = {}
    for choice in choices.values():
        counted[choice] = counted.get(choice, 0) + 1
    return [f"{kind} for {count} tensors: {reason}" for (kind, reason), count in counted.items()]
