"""PackedBitLinear runs packed codes: what a trained BitLinear becomes, with the same outputs to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qat import ops
from qat.config import QuantConfig
from qat.nn.bitlinear import BitLinear, rounded
from qat.nn.norm import input_norm
from qat.nn.withheld import WithheldWeight, traced
from qat.ops.options import PackedOptions
from qat.ops.prepared import PreparedLinear, prepare
from qat.quantizers.components import repeat, sum_components
from qat.quantizers.hadamard import check_rotated, rotate
from qat.quantizers.layouts import get_layout
from qat.quantizers.packing import check_packed
from qat.quantizers.scales import check_group_size, dequantize_weight, scale_shape


class PackedBitLinear(nn.Module):
    """A linear layer that runs from packed codes: uint8 `packed` and float32 `weight_scale`, `bias` and `rms_norm` if any.

    Moving it to another floating dtype leaves `weight_scale` in float32: it is part of the format. `dtype` is the one of the
    float weight that it stands for.
    """

    packed: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        config: QuantConfig,
        layout: str = "2bit",
        device: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        ops.check_kernels(config.kernels)
        check_group_size(in_features, config.group_size)
        check_rotated(in_features, config.act_hadamard)
        self.in_features, self.out_features = in_features, out_features
        self.config, self.layout, self.dtype = replace(config), layout, dtype
        self.width = in_features * config.planes
        """Codes a row: those of all planes, side by side."""
        count = f", components={config.planes}" if config.planes > 1 else ""
        self._version = f"layout {layout}, in_features={in_features}{count}"  # type: ignore[assignment]  # state_dict keeps it
        self._prepared: PreparedLinear | None = None
        self.name = ""
        """In its model, for messages."""
        scales = scale_shape(out_features, in_features, config.granularity, config.group_size, config.planes)
        row_bytes = get_layout(layout).row_bytes(self.width)
        self.register_buffer("packed", torch.zeros(out_features, row_bytes, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.ones(scales, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32, device=device) if bias else None)
        norm = input_norm(in_features, config.rms_norm_eps, device, dtype)
        self.rms_norm = None if norm is None else norm.requires_grad_(False)

    @classmethod
    def from_bitlinear(
        cls, layer: BitLinear, layout: str = "2bit", quantized: tuple[Tensor, Tensor] | None = None
    ) -> PackedBitLinear:
        """Pack a trained layer. Its outputs stay the same to the bit (at lambda 1).

        `quantized`: codes and scale to hold in place of the layer's own, as `BitLinear.quantized` shapes them.

        Raises:
            ValueError: the layout does not hold the quantizer's codes.
        """
        reason = layer.config.quantizer.unfit(get_layout(layout).holds)
        if reason is not None:
            raise ValueError(f"quant.weight={layer.config.weight} does not fit layout {layout}: {reason}")
        packed = cls(layer.in_features, layer.out_features, False, layer.config, layout, "meta", layer.weight.dtype)
        with torch.no_grad():
            codes, scale = layer.quantized() if quantized is None else quantized
            packed.packed = ops.pack_ternary(codes, layout)
            packed.weight_scale = scale
            bias = layer.output_bias()
            packed.bias = None if bias is None else bias.detach().clone()
        if layer.rms_norm is not None:
            packed.rms_norm = copy.deepcopy(layer.rms_norm).requires_grad_(False)
        return packed.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The shape, dtype and device of the float weight, without memory: reading its values raises ValueError.

        In a compiled or exported graph, too, when it runs.
        """
        if torch.compiler.is_compiling():
            return traced(self.packed, (self.out_features, self.in_features), self.dtype, self.name)
        return WithheldWeight((self.out_features, self.in_features), self.dtype, self.packed.device, self.name)

    def codes(self) -> Tensor:
        """int8 [out_features, planes * in_features] in {-1, 0, 1}; ValueError if a byte holds no codes."""
        return ops.unpack_ternary(self.packed, self.width, self.layout)

    def dequantize(self) -> Tensor:
        """codes * weight_scale, float32 [out_features, in_features]; planes are added. Rotated, if inputs are."""
        return sum_components(dequantize_weight(self.codes(), self.weight_scale), self.config.planes)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in x's dtype (autocast's, under autocast)."""
        x = input  # nn.Linear's name for it, by which some models call
        if self.rms_norm is not None or self.config.planes > 1:
            ops.check_input(x, self.in_features)
        if self.rms_norm is not None:
            x = self.rms_norm(x)
        if self.config.act_hadamard:
            ops.check_input(x, self.in_features)
            x = rotate(x)
        if self.config.act_bits == 4:
            x = rounded(x, self.config)
        if self.config.planes > 1:
            x = repeat(x, self.config.planes)
        if not torch.compiler.is_compiling():
            prepared = self._current()
            if prepared is not None and prepared.serves(x):
                return prepared(x)
        return ops.packed_linear(
            ops.cast_for_autocast(x),
            self.packed,
            self.weight_scale,
            self.bias,
            in_features=self.width,
            layout=self.layout,
            act_bits=self.config.kernel_act_bits,
            act_granularity=self.config.act_granularity,
            eps=self.config.eps,
            kernels=self.config.kernels,
        )

    def _current(self) -> PreparedLinear | None:
        """What runs this layer without detours: made at the first call, and again when a buffer was changed."""
        buffers, prepared = self._buffers, self._prepared
        packed, scale = buffers["packed"], buffers["weight_scale"]
        bias = buffers["bias"] if "bias" in buffers else self._parameters["bias"]
        assert packed is not None and scale is not None
        if prepared is not None and prepared.unchanged(packed, scale, bias):
            return prepared
        self._prepared = None
        if self.config.kernels != "reference":
            c = self.config
            options = PackedOptions(self.width, self.layout, c.kernel_act_bits, c.act_granularity, c.eps)
            self._prepared = prepare(packed, scale, bias, options)
        return self._prepared

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without what was prepared for this machine."""
        return {**self.__dict__, "_prepared": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedBitLinear:
        scale = self.weight_scale
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def check(self, name: str) -> None:
        """Raise ValueError, with the layer's `name`, for bytes and scales that no writer of ours produced."""
        check_packed(self.packed, self.width, self.layout, f"{name}.packed")
        _check_scale(self.weight_scale, f"{name}.weight_scale")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any) -> None:
        """Refuse bytes and scales that no writer of ours produced, before they become garbage output."""
        stored = metadata.get("version", self._version)
        if stored != self._version:
            raise ValueError(f"{prefix}packed was saved with {stored}, but this layer has {self._version}")
        name = prefix + "packed"
        if name in state_dict:
            check_packed(state_dict[name], self.width, self.layout, name)
        scale = state_dict.get(prefix + "weight_scale")
        if scale is not None:
            _check_scale(scale, f"{prefix}weight_scale")
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.config.weight} {self.layout}, scale {list(self.weight_scale.shape)}"
        )


def _check_scale(scale: Tensor, name: str) -> None:
    if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"{name} holds values that are not finite and above 0")
