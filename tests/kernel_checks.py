"""What the tests of the CPU and the CUDA kernels share: operands, configurations, and comparisons to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.config import QuantConfig
from qat.ops import reference
from qat.ops.bits.kept import Kept
from qat.ops.options import PackedOptions, weight_options
from qat.quantizers import latent, scales
from qat.quantizers.record import WeightOptions, resolve

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["2bit", "base3"]
EPS = 1e-5
CONFIGS = {
    "default": QuantConfig(),
    "binary": QuantConfig(weight="binary"),
    "channel": QuantConfig(granularity="channel", scale_dtype="bfloat16"),
    "group": QuantConfig(granularity="group", group_size=24, scale="absmax"),
    "absmedian": QuantConfig(act_granularity="tensor", scale="absmedian", scale_dtype="float16"),
    "binary channel": QuantConfig(weight="binary", granularity="channel"),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())

Op = Callable[..., Any]


def same(a: Tensor, b: Tensor) -> None:
    a, b = a.detach().cpu(), b.detach().cpu()
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} differ, by up to {(a.double() - b.double()).abs().max()}"


def tokens(m: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """x [m, k] of very different sizes, one token zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-4, 3, max(m, 1))[:m, None]
    if m > 2:
        x[1] = 0  # an all-zero token
    return x.to(dtype)


def codes(n: int, k: int, seed: int = 1) -> Tensor:
    return torch.randint(-1, 2, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def on_the_gpu(name: str, *arguments: Any) -> Any:
    """The op by its name, where tensors on a GPU take it."""
    return getattr(torch.ops.qat, name)(*arguments)


def unkept(kept: Tensor, w: Tensor, config: QuantConfig) -> Tensor:
    """Codes int8 [N, planes * K] of a weight as `bitlinear` keeps them."""
    return Kept(kept, w.shape[1] * config.planes).alone(torch.int8)


def check_weight_codes(w: Tensor, t: Tensor, scale: Tensor, config: QuantConfig, parameters: Sequence[Tensor] = ()) -> None:
    """The scale is the reference's, a fitted one but for the order of its sums; the codes are those of this very scale."""
    o = WeightOptions(*weight_options(config))
    rows, wanted, shape = latent.weight_scale(w, o, parameters)
    assert scale.dtype == torch.float32 and scale.shape == shape
    assert t.dtype == torch.int8 and t.shape == (w.shape[0], w.shape[1] * o.planes)
    rounding = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}[config.scale_dtype]  # a neighbour of the wanted one
    if resolve(config.quantizer.scale) is scales.statistic:
        rounding = 0
    torch.testing.assert_close(scale, latent.from_rows(wanted, shape), rtol=rounding, atol=0)
    named = latent.by_name(config.quantizer, o, parameters)
    expected = resolve(config.quantizer.codes)(rows, latent.as_rows(scale, o.planes), **named).to(torch.int8)
    same(t, torch.cat(list(expected.reshape(o.planes, *w.shape)), 1))


def check_packed_linear(
    place: tuple[torch.device, Op],
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    k: int,
    layout: str,
    granularity: str,
) -> None:
    device, op = place
    options = PackedOptions(k, layout, 8, granularity, EPS)
    moved = [None if value is None else value.to(device) for value in (x, packed, scale, bias)]
    same(op("packed_linear", *moved, *options), reference.packed_linear(x, packed, scale, bias, *options))
