"""The ops on the CPU: compiled kernels where they can be had, else the reference, and never silently.

The library is built and loaded at the first call, not at import. Weights are re-tiled in memory once and cached, keyed
by their storage and its version counter, so an in-place change, a new tensor and a freed one are all noticed. Latent
weights and tensors without a counter are fingerprinted besides, because `p.data.add_(...)` does not count: reading a
weight costs little beside a training step.

Legend: M tokens, N out_features, K in_features, G groups along K.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qat.ops import reference
from qat.ops.bits.kept import keep
from qat.ops.build import cpu as build_cpu
from qat.ops.choice import FROM, Status, choose, say_left
from qat.ops.derived import Derived
from qat.ops.operands import DTYPES, ELSEWHERE, FITTED, MAX_WIDTH, float_bias, multiplies, narrow
from qat.ops.options import PackedOptions, TrainingOptions, WeightOptions, weight_options
from qat.quantizers import binary, components, latent, packing, scales, ternary
from qat.quantizers.record import Quantizer, resolve

_PATHS = ("portable", "neon") if platform.machine() in ("aarch64", "arm64") else ("portable", "avx2", "avx512")
_PANEL = 64
_CODES = {ternary.codes: False, binary.codes: True}
"""What the kernel `cpu_codes` computes, and its flag for it; any scale will do, as torch computes what no kernel does."""


_status: Status | None = None
_lock = threading.Lock()


def paths() -> list[str]:
    """The instruction sets this CPU has a path for, slowest first."""
    return list(_PATHS[: torch.ops.qat.cpu_best_isa() + 1])


def select_isa(name: str) -> None:
    """Force a path, for tests and measurements; ValueError where the CPU does not have it."""
    if name not in paths():
        raise ValueError(f"QAT_CPU_ISA={name!r} is not possible here; choose one of {', '.join(paths())}")
    torch.ops.qat.cpu_isa(_PATHS.index(name))
    clear_caches()


def isa() -> str:
    """The path in use."""
    return _PATHS[torch.ops.qat.cpu_isa(-1)]


def start_isa() -> str:
    """Take the best path, or what QAT_CPU_ISA names; returns it."""
    if os.environ.get("QAT_CPU_ISA"):
        select_isa(os.environ["QAT_CPU_ISA"])
    return isa()


def _fake_linear(x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None, n: int, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _load() -> str:
    library, _ = build_cpu.load()
    torch.library.register_fake("qat::cpu_linear", _fake_linear)  # so that torch.compile may hold it (qat.inference.tiles)
    return f"{start_isa()} kernels{FROM}{library}; {ELSEWHERE}"


def status() -> Status:
    """Load the kernels, or find out why not, once; say on stderr what was taken."""
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                _status = choose("CPU", _load)
    return _status


def compiled() -> bool:
    """Whether the compiled kernels serve this call; loads them at the first."""
    return (_status or status()).kernels == "compiled"


def _content(tensor: Tensor) -> tuple[int, int]:
    counter = 0 if tensor.is_inference() else tensor._version
    return counter, torch.ops.qat.cpu_fingerprint(tensor.contiguous())


def _version(tensor: Tensor) -> tuple[int, int]:
    return _content(tensor) if tensor.is_inference() else (tensor._version, 0)


_packed_weights = Derived(_version)
_latent_weights = Derived(_content)
_transposed_codes = Derived(_version)


def clear_caches() -> None:
    """Forget all re-tiled weights."""
    for cache in (_packed_weights, _latent_weights, _transposed_codes):
        cache.entries.clear()


def _tile_scale(scale: Tensor, n: int) -> Tensor:
    """The scale as the kernels read it: [1] or [N], or by panels [ceil(N / 64), G, 64] where there are groups."""
    groups = scale.shape[1]
    if groups <= 1:
        return scale.reshape(-1).contiguous()
    panels = -(-n // _PANEL)
    rows = torch.zeros(panels * _PANEL, groups)
    rows[:n] = scale
    return rows.reshape(panels, _PANEL, groups).transpose(1, 2).contiguous()


def _base3_is_smaller(k: int, groups: int) -> bool:
    """Groups are padded to 80 codes in base-3 tiles and to 16 in 2-bit ones; 80 base-3 codes take the room of 64."""
    length = k // groups
    return -(-length // 80) * 64 < -(-length // 16) * 16


def packed_tiles(packed: Tensor, scale: Tensor, k: int, layout: str) -> tuple[Tensor, Tensor, bool]:
    """(tiles, scale, tiles are base-3) of packed weights, from the cache or made and checked now.

    Raises:
        ValueError: a byte of `packed` holds no ternary codes.
    """
    found, slot = _packed_weights.get((packed, scale), k, layout)
    if found is not None:
        return found
    packed, layout = packing.for_kernels(packed, k, layout)
    groups = scale.shape[1]
    base3 = layout == "base3" and torch.ops.qat.cpu_base3_tiles() and _base3_is_smaller(k, groups)
    tiles = torch.ops.qat.cpu_tile(packed.contiguous(), k, groups, layout == "base3", base3)
    return _packed_weights.put(slot, (tiles, _tile_scale(scale, packed.shape[0]), base3))


def serves(record: Quantizer) -> bool:
    """Whether compiled kernels run a layer of this quantizer."""
    return multiplies(record) and resolve(record.codes) in {*_CODES, *FITTED}


def _serves(x: Tensor, k: int) -> bool:
    return k <= MAX_WIDTH and compiled()


def quantize_activation(x: Tensor, granularity: str, eps: float) -> tuple[Tensor, Tensor]:
    if x.ndim == 0 or not x.is_floating_point() or not _serves(x, x.shape[-1]) or x.numel() == 0:
        return reference.quantize_activation(x, granularity, eps)
    return torch.ops.qat.cpu_quantize_activation(narrow(x), granularity == "tensor", eps)


def _statistic(rows: Tensor, options: WeightOptions, **parameters: Tensor) -> Tensor:
    """`scales.statistic`, in one pass where it is a mean."""
    if options.scale != "absmean":
        return scales.statistic(rows, options, **parameters)
    return scales.multiplied(torch.ops.qat.cpu_mean(rows.contiguous(), True), options)


SCALES: latent.Kernels = {scales.statistic: _statistic}


def square_sum(tensors: Sequence[Tensor]) -> float | None:
    """The sum of all squares, in float64 and in one order for every path and number of threads; None where no kernel serves."""
    if not compiled() or not all([x.is_cpu and x.dtype in DTYPES and x.is_contiguous() for x in tensors]):
        return None
    return torch.ops.qat.cpu_square_sum(tensors)


def fingerprint(x: Tensor) -> int | None:
    """Another number for other values, as good as always, at the speed of memory; None where no kernel serves."""
    return torch.ops.qat.cpu_fingerprint(x) if x.is_cpu and x.is_contiguous() and compiled() else None


def quantize_weight(w: Tensor, parameters: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    return _quantize(w, parameters, WeightOptions(*options))


def _quantize(w: Tensor, parameters: Sequence[Tensor], o: WeightOptions) -> tuple[Tensor, Tensor]:
    record = latent.record_of(o)
    flag = _CODES.get(resolve(record.codes))
    if w.numel() == 0 or not compiled():
        return latent.quantize_weight(w, o, parameters)
    if resolve(record.codes) is components.codes:
        return _nearest(w, parameters, o)
    if flag is None:
        say_left("cpu", o.weight, record, serves)
        return latent.quantize_weight(w, o, parameters)
    rows, value, shape = latent.weight_scale(w, o, parameters, SCALES)
    limit = torch.ops.qat.cpu_mean(rows.contiguous(), False) if flag else value
    return torch.ops.qat.cpu_codes(rows.contiguous(), limit.contiguous(), flag).reshape(w.shape), value.reshape(shape)


def _nearest(w: Tensor, parameters: Sequence[Tensor], o: WeightOptions) -> tuple[Tensor, Tensor]:
    """Several planes: the nearest levels of scales that torch fits or that are learned."""
    rows, value, shape = latent.weight_scale(w, o, parameters, SCALES)
    borders, book = components.code_book(value)
    t = torch.ops.qat.cpu_nearest(rows.contiguous(), borders.contiguous(), book.contiguous(), w.shape[1])
    return t, latent.from_rows(value, shape)


def packed_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    o = PackedOptions(*options)
    if o.act_bits is None or not _serves(x, o.in_features):
        return reference.packed_linear(x, packed, scale, bias, *options)
    arguments = _linear_arguments(packed, scale, bias, o)
    return torch.ops.qat.cpu_linear(narrow(x), *arguments).to(x.dtype)


def _linear_arguments(packed: Tensor, scale: Tensor, bias: Tensor | None, o: PackedOptions) -> tuple[Any, ...]:
    """What `cpu_linear` takes after x."""
    tiles, tile_scale, base3 = packed_tiles(packed, scale, o.in_features, o.layout)
    groups, per_tensor = scale.shape[1], o.act_granularity == "tensor"
    return tiles, tile_scale, float_bias(bias), packed.shape[0], o.in_features, groups, base3, per_tensor, o.eps


def linear_call(packed: Tensor, scale: Tensor, bias: Tensor | None, options: PackedOptions) -> tuple[Any, ...] | None:
    """(op, its arguments after x, and those of later calls), or None where the kernels do not serve."""
    if options.in_features > MAX_WIDTH or not compiled():
        return None
    arguments = _linear_arguments(packed, scale, bias, options)
    return torch.ops.qat.cpu_linear.default, arguments, arguments


def _latent_codes(w: Tensor, parameters: Sequence[Tensor], o: TrainingOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes to keep, scale, tiles, scale as the kernels read it) of a latent weight: the cache's until something changes."""
    found, slot = _latent_weights.get((w, *parameters), latent.record_of(o), *weight_options(o))
    if found is not None:
        return found
    with torch.inference_mode(False), torch.no_grad():  # kept for training too, which cannot save inference tensors
        t, scale = _quantize(w, parameters, o)
        tiles = torch.ops.qat.cpu_tile_codes(t.contiguous(), scale.shape[1])
        codes = keep(t, latent.record_of(o), torch.ops.qat.pack_bits)
        return _latent_weights.put(slot, (codes, scale, tiles, _tile_scale(scale, t.shape[0])))


def bitlinear(
    x: Tensor, w: Tensor, bias: Tensor | None, parameters: Sequence[Tensor], *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    o = TrainingOptions(*options)
    n, k = w.shape[0], w.shape[1] * o.planes
    if o.act_bits is None or not _serves(x, k) or w.numel() == 0:
        return reference.bitlinear(x, w, bias, parameters, *options, pack=torch.ops.qat.pack_bits)
    if not multiplies(latent.record_of(o)):
        say_left("cpu", o.weight, latent.record_of(o), serves)
        return reference.bitlinear(x, w, bias, parameters, *options, pack=torch.ops.qat.pack_bits)
    codes, w_scale, tiles, tile_scale = _latent_codes(w, parameters, o)
    y, x_q, x_scale = multiply(x, tiles, tile_scale, bias, (n, k, w_scale.shape[1]), o)
    # Views: an op's results belong to its caller, the cache keeps its own tensors.
    return y, x_q, x_scale, codes.view(codes.shape), w_scale.view(w_scale.shape)


def multiply(
    x: Tensor, tiles: Tensor, tile_scale: Tensor, bias: Tensor | None, shape: tuple[int, int, int], o: TrainingOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x_q, x_scale) of tiles of a weight [N, planes * K] in G groups, `shape` in this order."""
    wide, per_tensor = components.repeat(narrow(x), o.planes), o.act_granularity == "tensor"
    y, x_q, x_scale = torch.ops.qat.cpu_bitlinear(wide, tiles, tile_scale, float_bias(bias), *shape, per_tensor, o.eps)
    if o.planes > 1:
        x_q = x_q[..., : x.shape[-1]].contiguous()
    return y.to(x.dtype), x_q, x_scale


def quantized_matmul(x: Tensor, t: Tensor, eps: float) -> Tensor:
    n, k = t.shape
    if t.numel() == 0 or not _serves(x, n):
        return reference.quantized_matmul(x, t, eps)
    tiles, slot = _transposed_codes.get((t,))
    if tiles is None:
        tiles = _transposed_codes.put(slot, torch.ops.qat.cpu_tile_codes(t.t().contiguous(), 1))
    return torch.ops.qat.cpu_linear(narrow(x), tiles, torch.ones(1), None, k, n, 1, False, False, eps).to(x.dtype)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype not in DTYPES or codes.numel() == 0 or not compiled():
        return reference.dequantize(codes, scale, dtype)
    groups = scale.shape[-1]
    if scale.numel() > 1:
        scale = scale.expand(*codes.shape[:-1], groups)
    rows = codes.contiguous().view(-1, codes.shape[-1] // groups)
    return torch.ops.qat.cpu_dequantize(rows, scale.reshape(-1).contiguous(), DTYPES.index(dtype)).view(codes.shape)


KERNELS = {
    "dequantize": dequantize,
    "quantize_activation": quantize_activation,
    "quantize_weight": quantize_weight,
    "fake_quantize": partial(reference.fake_quantize, quantize=quantize_weight),
    "packed_linear": packed_linear,
    "bitlinear": bitlinear,
    "quantized_matmul": quantized_matmul,
}
