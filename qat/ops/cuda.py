"""The ops on CUDA: compiled kernels on GPUs of compute capability 8.0 or later, else the reference, and never silently.

The library is compiled and loaded at the first call. No op waits for the device, except that `pack_ternary` and `unpack_ternary`
refuse bad values, for which they must look at them. All work is in the current stream of the tensors' device and can be captured
into a CUDA graph, after a first call outside of one.

Latent weights are quantized anew at every forward: on a GPU that costs one read of the weight, a few percent of a training step,
where noticing every change (`p.data.add_(...)` counts no version) would cost the same read and a wait. It also keeps a captured
step right: its replay quantizes the weight as the optimizer left it. Packed bytes that are not 2bit are repacked once and kept.

Legend: M tokens, N out_features, K in_features, G groups along K.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qat.ops import products, reference
from qat.ops.bits.kept import keep
from qat.ops.build import cuda as build_cuda
from qat.ops.build.store import BuildError
from qat.ops.choice import FROM, Status, choose, say_left
from qat.ops.derived import Derived
from qat.ops.operands import ELSEWHERE, FITTED, MAX_WIDTH, float_bias, multiplies, narrow
from qat.ops.options import PackedOptions, TrainingOptions, WeightOptions
from qat.ops.products.probe import probe
from qat.quantizers import binary, components, latent, packing, scales, ternary
from qat.quantizers.record import Quantizer, resolve

MAX_INT8_WIDTH = 2**17  # sums of int8 times int8 stay in int32
# The enums of csrc/cuda/kernels.h
_GRANULARITIES = {"tensor": 0, "channel": 1, "group": 2}
_REDUCTIONS = {"absmean": 0, "absmax": 1}
_GIVEN = 2
_SCALE_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_CODES = {ternary.codes: False, binary.codes: True}
"""What the kernel `cuda_quantize_weight` computes, and its flag for it; scales that are no reduction of its own are given."""

_states: dict[int, Status] = {}
_lock = threading.Lock()


def _load(index: int) -> str:
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    if torch.version.cuda is None:
        raise BuildError("this torch is built without CUDA")
    if capability < build_cuda.LEAST:
        least = ".".join(map(str, build_cuda.LEAST))
        raise BuildError(
            f"{name} has compute capability {capability[0]}.{capability[1]}; the kernels need {least} (Ampere) or later"
        )
    arch = build_cuda.arch_of(capability)
    library = build_cuda.load(build_cuda.needed_archs())
    built = build_cuda.archs_of(library)
    if not any(build_cuda.serves(one, arch) for one in built):
        raise BuildError(f"{library} is built for {', '.join(built)}, but {name} needs {arch}; name it in QAT_CUDA_ARCHS")
    probe(torch.device("cuda", index), f"{name} (sm_{arch}) does not run {library}")
    how = "" if any(build_cuda.has_code(one, arch) for one in built) else ", made from PTX by its driver"
    return f"{name} (sm_{arch}{how}){FROM}{library}; {ELSEWHERE}"


def status(index: int | None = None) -> Status:
    """Load the kernels of a device, the current one if None, or find out why not, once; say on stderr what was taken."""
    place = torch.cuda.current_device() if index is None else index
    if place not in _states:
        with _lock:
            if place not in _states:
                _states[place] = choose("CUDA", lambda: _load(place))
    return _states[place]


def serves(record: Quantizer) -> bool:
    """Whether compiled kernels run a layer of this quantizer."""
    return multiplies(record) and resolve(record.codes) in {*_CODES, *FITTED}


def _serves(x: Tensor, k: int = 0) -> bool:
    return k <= MAX_WIDTH and status(x.device.index).kernels == "compiled"


_bits = Derived(lambda tensor: tensor._version)


def clear_caches() -> None:
    """Forget all repacked weights; CUDA graphs that read them must not be replayed any more."""
    _bits.entries.clear()


def two_bit(packed: Tensor, k: int, layout: str) -> Tensor:
    """Packed weights in the layout that the kernels read; what is made is kept as long as `packed` lives.

    Nothing is kept that is made inside a capture, because its memory belongs to the graph. Where `packed` has changed, the
    kept bytes are overwritten in place, so a graph that was captured with them reads valid memory, and the new weight.
    """
    if layout == "2bit":
        return packed.contiguous()
    repack = torch.ops.qat.cuda_repack if layout == "base3" else lambda packed, k: packing.two_bit(packed, k, layout)
    if packed.is_inference():  # it counts no versions
        return repack(packed.contiguous(), k)
    found, slot = _bits.get((packed,), k)
    stream, capturing = torch.cuda.current_stream(packed.device), torch.cuda.is_current_stream_capturing()
    if found is None:
        bits, stale = repack(packed.contiguous(), k), _bits.stale(slot)
        if capturing:
            return bits
        bits = bits if stale is None else stale[0].copy_(bits)
        _bits.put(slot, (bits, stream, stream.record_event()))
        return bits
    bits, maker, ready = found
    if stream != maker and not capturing:  # the start of a capture has waited for the device
        ready.wait(stream)
    return bits


def quantize_activation(x: Tensor, granularity: str, eps: float) -> tuple[Tensor, Tensor]:
    if x.ndim == 0 or not x.is_floating_point() or x.numel() == 0 or not _serves(x, x.shape[-1]):
        return reference.quantize_activation(x, granularity, eps)
    return torch.ops.qat.cuda_quantize_activation(narrow(x), granularity == "tensor", eps)


def quantize_weight(w: Tensor, parameters: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    return _quantize(w, parameters, WeightOptions(*options))


def _quantize(w: Tensor, parameters: Sequence[Tensor], o: WeightOptions) -> tuple[Tensor, Tensor]:
    if w.ndim != 2 or not w.is_floating_point() or w.numel() == 0 or not _serves(w):
        return latent.quantize_weight(w, o, parameters)
    if resolve(latent.record_of(o).codes) not in _CODES:
        say_left("cuda", o.weight, latent.record_of(o), serves)
        return latent.quantize_weight(w, o, parameters)
    return torch.ops.qat.cuda_quantize_weight(narrow(w), *weight_arguments(w, o, parameters), False)


def _statistic(rows: Tensor, options: WeightOptions, **parameters: Tensor) -> Tensor:
    """`scales.statistic`, its mean by the kernel that also writes codes: a byte a weight, where torch would write twelve."""
    (r, length), one = rows.shape, rows.shape[0] == 1
    if options.scale != "absmean" or not _serves(rows, 1 if one else length):
        return scales.statistic(rows, options, **parameters)
    w = rows.view(-1, math.gcd(length, MAX_WIDTH)) if one else rows
    arguments = _GRANULARITIES["tensor" if one else "channel"], _REDUCTIONS["absmean"], 1, False, 0, 0.0, None
    mean = torch.ops.qat.cuda_quantize_weight(w.contiguous(), *arguments, False)[1]
    return scales.multiplied(mean.reshape(r, 1), options)


SCALES: latent.Kernels = {scales.statistic: _statistic}


def reduction_of(o: WeightOptions) -> int | None:
    """The kernel's own, which gives the scale; None where the scale is given to it."""
    own = resolve(latent.record_of(o).scale) is scales.statistic and o.scale_multiplier == 1
    return _REDUCTIONS.get(o.scale) if own else None


def weight_arguments(w: Tensor, o: WeightOptions, parameters: Sequence[Tensor] = ()) -> tuple[Any, ...]:
    """What `cuda_quantize_weight` takes after w; its last argument tells codes from 2-bit bytes."""
    scales.check_group_size(w.shape[1], o.group_size)
    record, given = latent.record_of(o), None
    own = reduction_of(o)
    reduction = _GIVEN if own is None else own
    shape = latent.shape_of(w, o)
    if reduction == _GIVEN:
        given = latent.weight_scale(w, o, parameters, SCALES)[1].reshape(shape).contiguous()
    flag, scale_dtype = _CODES[resolve(record.codes)], _SCALE_DTYPES[o.scale_dtype]
    return _GRANULARITIES[o.granularity], reduction, shape[1], flag, scale_dtype, o.eps, given


def pack_ternary(t: Tensor, layout: str) -> Tensor:
    if t.ndim != 2 or t.dtype != torch.int8 or t.numel() == 0 or layout not in packing.KERNEL_LAYOUTS or not _serves(t):
        return packing.pack_ternary(t, layout)
    bad = torch.full((1,), -1, dtype=torch.int64, device=t.device)
    packed = torch.ops.qat.cuda_pack(t.contiguous(), layout == "base3", bad)
    return packed if bad.item() < 0 else packing.pack_ternary(t, layout)  # which says what is wrong


def unpack_ternary(packed: Tensor, k: int, layout: str) -> Tensor:
    known = layout in packing.KERNEL_LAYOUTS and packed.dtype == torch.uint8 and packed.ndim == 2 and packed.numel() > 0
    if not known or packed.shape[1] != packing.get_layout(layout).row_bytes(k) or not _serves(packed):
        return packing.unpack_ternary(packed, k, layout)
    bad = torch.full((1,), -1, dtype=torch.int64, device=packed.device)
    t = torch.ops.qat.cuda_unpack(packed.contiguous(), k, layout == "base3", bad)
    return t if bad.item() < 0 else packing.unpack_ternary(packed, k, layout)  # which says what is wrong


def _linear_arguments(packed: Tensor, scale: Tensor, bias: Tensor | None, o: PackedOptions) -> tuple[Any, ...]:
    """What `cuda_packed_linear` takes between x and `overlap`."""
    bits = two_bit(packed, o.in_features, o.layout)
    return bits, scale.contiguous(), float_bias(bias), o.in_features, o.act_granularity == "tensor", o.eps


def packed_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    o = PackedOptions(*options)
    if o.act_bits is None or x.numel() == 0 or packed.numel() == 0 or not _serves(x, o.in_features):
        return reference.packed_linear(x, packed, scale, bias, *options)
    arguments = _linear_arguments(packed, scale, bias, o)
    return _packed(narrow(x), *arguments, False).to(x.dtype)


def _packed(x: Tensor, bits: Tensor, scale: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """`cuda_packed_linear`, for many tokens by the products that the device prefers."""
    k, per_tensor, eps, _ = rest
    if products.preferred(x) and x.numel() > products.FEW_TOKENS * k:
        x_q, divisor, _ = torch.ops.qat.cuda_activation_codes(x, per_tensor, eps)
        t = torch.ops.qat.cuda_unpack(bits, k, False, torch.full((1,), -1, dtype=torch.int64, device=x.device))
        y = products.rescaled(x_q, divisor, t, scale, bias, x.dtype)
        if y is not None:
            return y
    return torch.ops.qat.cuda_packed_linear.default(x, bits, scale, bias, *rest)


def linear_call(packed: Tensor, scale: Tensor, bias: Tensor | None, options: PackedOptions) -> tuple[Any, ...] | None:
    """(op, its arguments after x, and those of later calls), or None where the kernels do not serve.

    Calls overlap the kernel before them, whatever it wrote: nothing is read before that one has ended.
    """
    if packed.numel() == 0 or not _serves(packed, options.in_features):
        return None
    arguments = _linear_arguments(packed, scale, bias, options)
    run = _packed if products.preferred(packed) else torch.ops.qat.cuda_packed_linear.default
    return run, (*arguments, True), (*arguments, True)


def bitlinear(
    x: Tensor, w: Tensor, bias: Tensor | None, parameters: Sequence[Tensor], *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    o = TrainingOptions(*options)
    if o.act_bits is None or x.numel() == 0 or w.numel() == 0 or not _serves(x, w.shape[1] * o.planes):
        return reference.bitlinear(x, w, bias, parameters, *options, pack=torch.ops.qat.pack_bits)
    if not multiplies(latent.record_of(o)):
        say_left("cuda", o.weight, latent.record_of(o), serves)
        return reference.bitlinear(x, w, bias, parameters, *options, pack=torch.ops.qat.pack_bits)
    t, w_scale = _quantize(w, parameters, o)
    return *_multiply(x, t, w_scale, bias, o), keep(t, latent.record_of(o), torch.ops.qat.pack_bits), w_scale


def _multiply(x: Tensor, t: Tensor, w_scale: Tensor, bias: Tensor | None, o: TrainingOptions) -> tuple[Tensor, Tensor, Tensor]:
    y, x_q, x_scale = _linear(
        components.repeat(narrow(x), o.planes), t, w_scale, float_bias(bias), o.act_granularity == "tensor", o.eps
    )
    if o.planes > 1:
        x_q = x_q[..., : x.shape[-1]].contiguous()
    return y.to(x.dtype), x_q, x_scale


def coded_bitlinear(
    x: Tensor, codes: Tensor, w_scale: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.coded_bitlinear`."""
    o, unpack = TrainingOptions(*options), torch.ops.qat.unpack_bits
    k = x.shape[-1] * o.planes
    if o.act_bits is None or codes.dtype == torch.int8 or x.numel() == 0 or codes.numel() == 0 or not _serves(x, k):
        return reference.coded_bitlinear(x, codes, w_scale, bias, *options, unpack=unpack)
    return _multiply(x, unpack(codes, k), w_scale.contiguous(), bias, o)


def _linear(
    x: Tensor, t: Tensor, w_scale: Tensor, bias: Tensor | None, per_tensor: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`cuda_bitlinear`, by the products that the device prefers."""
    if products.preferred(x):
        x_q, divisor, x_scale = torch.ops.qat.cuda_activation_codes(x, per_tensor, eps)
        y = products.rescaled(x_q, divisor, t, w_scale, bias, x.dtype)
        if y is not None:
            return y, x_q, x_scale
    return torch.ops.qat.cuda_bitlinear(x, t, w_scale, bias, per_tensor, eps)


def quantized_matmul(x: Tensor, t: Tensor, eps: float) -> Tensor:
    if x.numel() == 0 or t.numel() == 0 or not _serves(x, t.shape[0]):
        return reference.quantized_matmul(x, t, eps)
    one = x.new_ones(1, 1, dtype=torch.float32)
    return _linear(narrow(x), t.t().contiguous(), one, None, False, eps)[0].to(x.dtype)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    if a.numel() == 0 or b.numel() == 0 or a.shape[1] > MAX_INT8_WIDTH or not _serves(a):
        return reference.int8_matmul(a, b)
    if products.preferred(a):
        return products.int8_matmul(a, b)
    return torch.ops.qat.cuda_int8_matmul(a.contiguous(), b.t().contiguous())


KERNELS = {
    "quantize_activation": quantize_activation,
    "quantize_weight": quantize_weight,
    "fake_quantize": partial(reference.fake_quantize, quantize=quantize_weight),
    "pack_ternary": pack_ternary,
    "unpack_ternary": unpack_ternary,
    "packed_linear": packed_linear,
    "bitlinear": bitlinear,
    "coded_bitlinear": coded_bitlinear,
    "quantized_matmul": quantized_matmul,
    "int8_matmul": int8_matmul,
}
