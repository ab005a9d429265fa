"""BitLinear trains a latent weight; what runs packed codes is a class of its own (`qat.nn.packed`), never a mode of this one."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat import ops
from qat.config import QuantConfig
from qat.nn.carried import carried, carried_share
from qat.nn.norm import input_norm
from qat.ops.fused.choice import fused as fused_linear
from qat.ops.fused.linear import FusedLinear
from qat.ops.soft.calls import soft_bitlinear, soft_quantize
from qat.quantizers.activations import rounded_activation
from qat.quantizers.components import sum_components
from qat.quantizers.hadamard import check_rotated, rotate
from qat.quantizers.record import resolve
from qat.quantizers.scales import check_block, check_group_size, dequantize_weight
from qat.quantizers.ste import mix


def rounded(x: Tensor, config: QuantConfig) -> Tensor:
    """Inputs as the ops take them: of other than 8 bits, which no kernel knows, they are rounded here."""
    return rounded_activation(x, config.act_granularity, config.eps, config.act_bits) if config.act_bits == 4 else x


@cache
def _say_float_form() -> None:
    """Once a process."""
    print("qat: while lambda is below 1, BitLinear computes in floating point, without the integer kernels", file=sys.stderr)


class BitLinear(nn.Linear):
    """nn.Linear whose forward quantizes the weight and the input (BitNet b1.58, arXiv:2402.17764).

    `weight` [out_features, in_features] is the latent weight: an ordinary parameter that optimizers, DDP, FSDP and
    `save_pretrained` treat as any other. The bias is added after rescaling. With `config.rms_norm_eps` the child `rms_norm` norms
    the input before it is quantized. A quantizer with parameters of its own (a learned scale) makes them the layer's, by name.
    """

    _of_floats: QuantConfig | None = None
    """The ops' configuration where inputs are rounded before them."""
    _fused: FusedLinear | None = None
    """What runs it without detours."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: QuantConfig | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._configure(config or QuantConfig())
        self.rms_norm = input_norm(in_features, self.config.rms_norm_eps, device, dtype)
        self.reset_quantizer()

    def _configure(self, config: QuantConfig) -> None:
        ops.check_config(config)
        check_group_size(self.in_features, config.group_size)
        check_block(self.in_features, config.quantizer.block, config.weight)
        check_rotated(self.in_features, config.act_hadamard)
        self.config = replace(config)
        self._of_floats = replace(config, act_bits=None) if config.act_bits == 4 else None
        self.lam: Tensor | None = None
        self.beta: Tensor | None = None
        record = config.quantizer
        self.parameter_names = tuple(record.parameters)
        self.added_bias = None if record.bias is None else resolve(record.bias)

    def reset_quantizer(self) -> None:
        """Make the quantizer's parameters, and its buffers, what they start with for the weight as it is."""
        record = self.config.quantizer.parameters
        for name, value in ops.initial_parameters(self.weight, self.config).items() if record else ():
            if record[name].trained:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def quantizer_parameters(self) -> dict[str, Tensor]:
        """The parameters and buffers of its quantizer by name, float32 as the scale [1 | N, G], or [1]; {} where it has none."""
        return {name: getattr(self, name) for name in self.parameter_names}

    def _given(self) -> list[Tensor]:
        """`quantizer_parameters` as the ops take them, in the record's order."""
        return list(self.quantizer_parameters().values())

    def quantized(self) -> tuple[Tensor, Tensor]:
        """Codes int8 [N, K] and scale float32 [1 | N, G] of the weight as it is, see `qat.ops.quantize_weight`."""
        return ops.quantize_weight(self.weight, self.config, self._given())

    def output_bias(self, share: Tensor | float = 1.0) -> Tensor | None:
        """What is added to the outputs: the bias, and that share of what the quantizer adds to it (float32 then)."""
        if self.added_bias is None:
            return self.bias
        codes, _ = ops.quantize_weight(self.weight.detach(), self.config, self._given())
        added: Tensor = share * self.added_bias(self.weight, codes)
        return added if self.bias is None else added + self.bias.float()

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: QuantConfig | None = None) -> BitLinear:
        """A BitLinear that shares `linear`'s parameters, training mode and device. A norm of its input is new, of weight 1."""
        layer = cls(linear.in_features, linear.out_features, False, config, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.rms_norm = input_norm(linear.in_features, layer.config.rms_norm_eps, linear.weight.device, linear.weight.dtype)
        layer.reset_quantizer()
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """As nn.Linear; nothing on meta, where layers are made to hold other layers' parameters: torch takes its time over it."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def set_lambda(self, value: float) -> None:
        """Blend quantization in: W + lambda (Q(W) - W), activations likewise; 1 is plain. ValueError unless it is in 0 to 1."""
        self.lam = carried_share("lambda", value, self.lam, self.weight.device)
        if self.lam is not None:
            _say_float_form()

    def set_beta(self, value: float | None, carrier: Tensor | None = None) -> None:
        """Train with soft codes of that sharpness, see `qat.quantizers.soft`; None: with codes, straight through.

        Soft codes are of training mode alone: in `eval()` the layer computes with codes, as it will be deployed. Layers may
        share the tensor that carries the value, `carrier`, which is set.

        Raises:
            ValueError: the value is not above 0 and finite, or the quantizer has no soft form.
        """
        record = self.config.quantizer
        if record.sharpened and (value is None or 0 < value < math.inf):
            getattr(self, record.sharpened).fill_(value or 0.0)
            return
        if value is None:
            self.beta = None
            return
        if not 0 < value < math.inf:
            raise ValueError(f"beta={value} is not allowed; it must be above 0 and finite")
        if record.soft is None:
            raise ValueError(f"quant.weight={self.config.weight} has no soft form, so it cannot be annealed")
        self.beta = carried(value, self.beta, self.weight.device) if carrier is None else carrier

    def met(self, x: Tensor) -> Tensor:
        """What of an input [..., in_features] is quantized: normed and rotated, where the layer does that."""
        if self.rms_norm is not None:
            ops.check_input(x, self.in_features)
            x = self.rms_norm(x)
        if self.config.act_hadamard:
            ops.check_input(x, self.in_features)
            x = rotate(x)
        return x

    @property
    def hard(self) -> bool:
        """Whether `forward`, as it would run now, takes no more of the weight than its codes and scales."""
        return self.lam is None and (self.beta is None or not self.training)

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's name for it, by which some models call
        """[..., in_features] -> [..., out_features]."""
        x, beta = self.met(input), self.beta if self.training else None
        if self.lam is None and not torch.compiler.is_compiling():
            weight, own = self._parameters.get("weight"), self._parameters.get("bias")
            if weight is not None and (y := self._current(weight)(x, weight, own, beta)) is not None:
                return y
        parameters = self._given()
        if self.lam is not None:
            bias = self.output_bias(self.lam)
            bias = None if bias is None else bias.to(self.weight.dtype)
            return F.linear(self._mixed_activation(x, self.lam), self._mixed_weight(self.lam, beta, parameters), bias)
        x, config = rounded(x, self.config), self._of_floats or self.config
        if beta is not None:
            return soft_bitlinear(x, self.weight, self.output_bias(), beta, config, parameters)
        return ops.bitlinear(x, self.weight, self.output_bias(), config, parameters)

    def _current(self, weight: Tensor) -> FusedLinear:
        """Made at the first call, and again where something of it is another."""
        found = self._fused
        if found is None or not found.of(self.config, weight):
            found = self._fused = fused_linear(self.config, weight)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without what was prepared for this machine."""
        return {**self.__dict__, "_fused": None}

    def _mixed_weight(self, lam: Tensor, beta: Tensor | None, parameters: list[Tensor]) -> Tensor:
        if beta is not None:
            return self.weight + lam * (soft_quantize(self.weight, beta, self.config, parameters)[0] - self.weight)
        if self.config.quantizer.gradient is not None:
            return self.weight + lam * (ops.fake_quantize(self.weight, self.config, parameters) - self.weight)
        codes, scale = ops.quantize_weight(self.weight.detach(), self.config, parameters)
        quantized = sum_components(dequantize_weight(codes, scale), self.config.planes)
        return mix(self.weight, quantized.to(self.weight.dtype), lam).to(self.weight.dtype)

    def _mixed_activation(self, x: Tensor, lam: Tensor) -> Tensor:
        config = self.config
        if config.act_bits is None:
            return x
        if config.act_bits == 4:
            return mix(x, rounded(x.detach(), config), lam).to(x.dtype)
        codes, scale = ops.quantize_activation(x.detach(), config.act_granularity, config.eps, config.kernels)
        return mix(x, (codes * scale).to(x.dtype), lam).to(x.dtype)

    def extra_repr(self) -> str:
        c = self.config
        activations = f"int{c.act_bits} per {c.act_granularity}" if c.act_bits else "float"
        return f"{super().extra_repr()}, {c.words}, activations {activations}{' rotated' if c.act_hadamard else ''}"
