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
import sys
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qat import packing, quantizers
from qat.ops import reference

_PATHS = ("portable", "neon") if platform.machine() in ("aarch64", "arm64") else ("portable", "avx2", "avx512")
_PANEL = 64
MAX_WIDTH = 2**18
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Status:
    """Which kernels the CPU has, and why."""

    kernels: str
    why: str


_status: Status | None = None
_lock = threading.Lock()


def paths() -> list[str]:
    """The instruction sets this CPU has a path for, slowest first."""
    now = torch.ops.qat.cpu_isa(-1)
    best = now
    while best + 1 < len(_PATHS) and _try_isa(best + 1):
        best += 1
    torch.ops.qat.cpu_isa(now)
    return list(_PATHS[: best + 1])


def _try_isa(index: int) -> bool:
    try:
        torch.ops.qat.cpu_isa(index)
    except RuntimeError:
        return False
    return True


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


def _find() -> Status:
    from qat.ops import build  # not at import: `python -m qat.ops.build` imports this package first

    wish = os.environ.get("QAT_KERNELS", "auto")
    if wish not in ("auto", "compiled", "reference"):
        raise ValueError(f"QAT_KERNELS={wish!r} is not allowed; choose one of auto, compiled, reference")
    if wish == "reference":
        return Status("reference", "QAT_KERNELS=reference")
    try:
        library = build.load()
    except build.BuildError as error:
        if wish == "compiled":
            raise RuntimeError(f"QAT_KERNELS=compiled, but there are no compiled CPU kernels: {error}") from error
        return Status("reference", str(error))
    torch.library.register_fake("qat::cpu_linear", _fake_linear)  # so that torch.compile may hold it (qat.inference)
    return Status(
        "compiled", f"{start_isa()} kernels from {library}; float activations and in_features > {MAX_WIDTH} run in pure torch"
    )


def status() -> Status:
    """Load the kernels, or find out why not, once; say on stderr what was taken."""
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                found = _find()
                print(f"qat: {found.kernels} CPU kernels: {found.why}", file=sys.stderr, flush=True)
                _status = found
    return _status


def compiled() -> bool:
    """Whether the compiled kernels serve this call; loads them at the first."""
    return (_status or status()).kernels == "compiled"


def _version(tensor: Tensor, thorough: bool) -> tuple[int, int]:
    counter = 0 if tensor.is_inference() else tensor._version
    if not (thorough or tensor.is_inference()):
        return counter, 0
    return counter, torch.ops.qat.cpu_fingerprint(tensor.contiguous())


class _Cache:
    """Values derived from tensors, kept while the tensors live unchanged."""

    def __init__(self, thorough: bool) -> None:
        self.thorough = thorough
        self.entries: dict[tuple[Any, ...], tuple[tuple[StorageWeakRef, ...], tuple[Any, ...], Any]] = {}

    def get(self, tensors: tuple[Tensor, ...], *options: Any) -> tuple[Any, Any]:
        """The value, or None, and the token to store one with."""
        key = (*[(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors], *options)
        versions = tuple([_version(t, self.thorough) for t in tensors])
        entry = self.entries.get(key)
        if (
            entry is not None
            and entry[1] == versions
            and all(ref.cdata == t.untyped_storage()._cdata for ref, t in zip(entry[0], tensors, strict=True))
        ):
            return entry[2], None
        return None, (key, tensors, versions)

    def put(self, token: Any, value: Any) -> Any:
        key, tensors, versions = token
        for old in [k for k, (refs, *_) in list(self.entries.items()) if any(ref.expired() for ref in refs)]:
            self.entries.pop(old, None)
        self.entries[key] = tuple(StorageWeakRef(t.untyped_storage()) for t in tensors), versions, value
        return value


_packed_weights = _Cache(thorough=False)
_latent_weights = _Cache(thorough=True)
_transposed_codes = _Cache(thorough=False)


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
    found, token = _packed_weights.get((packed, scale), k, layout)
    if found is not None:
        return found
    packing.check_packed(packed, k, layout)
    groups = scale.shape[1]
    base3 = layout == "base3" and torch.ops.qat.cpu_base3_tiles() and _base3_is_smaller(k, groups)
    tiles = torch.ops.qat.cpu_tile(packed.contiguous(), k, groups, layout == "base3", base3)
    return _packed_weights.put(token, (tiles, _tile_scale(scale, packed.shape[0]), base3))


def _serves(x: Tensor, k: int) -> bool:
    return k <= MAX_WIDTH and compiled()


def _narrow(x: Tensor) -> Tensor:
    """float64 is quantized from float32, as the reference does."""
    return x if x.dtype in _DTYPES else x.float()


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def quantize_activation(x: Tensor, granularity: str, eps: float) -> tuple[Tensor, Tensor]:
    if x.ndim == 0 or not x.is_floating_point() or not _serves(x, x.shape[-1]) or x.numel() == 0:
        return reference.quantize_activation(x, granularity, eps)
    return torch.ops.qat.cpu_quantize_activation(_narrow(x), granularity == "tensor", eps)


def quantize_weight(
    w: Tensor, weight: str, scale: str, granularity: str, group_size: int | None, scale_dtype: str, eps: float
) -> tuple[Tensor, Tensor]:
    if w.numel() == 0 or not compiled():
        return quantizers.quantize_weight(w, weight, scale, granularity, group_size, scale_dtype, eps)
    rows, value, shape = quantizers.weight_scale(w, scale, granularity, group_size, scale_dtype, eps)
    binary = weight == "binary"
    threshold = rows.mean(-1, keepdim=True) if binary else value
    return torch.ops.qat.cpu_codes(rows.contiguous(), threshold.contiguous(), binary).reshape(w.shape), value.reshape(shape)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    layout: str,
    act_bits: int | None,
    act_granularity: str,
    eps: float,
) -> Tensor:
    if act_bits is None or not _serves(x, in_features):
        return reference.packed_linear(x, packed, scale, bias, in_features, layout, act_bits, act_granularity, eps)
    tiles, tile_scale, base3 = packed_tiles(packed, scale, in_features, layout)
    y = torch.ops.qat.cpu_linear(
        _narrow(x),
        tiles,
        tile_scale,
        _bias(bias),
        packed.shape[0],
        in_features,
        scale.shape[1],
        base3,
        act_granularity == "tensor",
        eps,
    )
    return y.to(x.dtype)


class PreparedLinear:
    """A packed linear ready to run: for one token the checks and look-ups above would cost as much as the arithmetic.

    It holds the tensors that it was made from and serves a call only while they are the same objects, unchanged.
    Slots, because between two calls of a large model everything here has left the caches.
    """

    __slots__ = ("arguments", "k", "run", "sources", "versions")

    def __init__(
        self, packed: Tensor, scale: Tensor, bias: Tensor | None, k: int, layout: str, act_granularity: str, eps: float
    ) -> None:
        tiles, tile_scale, base3 = packed_tiles(packed, scale, k, layout)
        self.k, self.sources = k, (packed, scale, bias)
        self.versions = packed._version, scale._version, 0 if bias is None else bias._version
        self.arguments = (
            tiles,
            tile_scale,
            _bias(bias),
            packed.shape[0],
            k,
            scale.shape[1],
            base3,
            act_granularity == "tensor",
            eps,
        )
        self.run = torch.ops.qat.cpu_linear.default

    def unchanged(self, packed: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
        """Whether these are the tensors it was made from, unmodified since."""
        sources, versions = self.sources, self.versions
        return (
            packed is sources[0]
            and scale is sources[1]
            and bias is sources[2]
            and packed._version == versions[0]
            and scale._version == versions[1]
            and (bias is None or bias._version == versions[2])
        )

    def serves(self, x: Tensor) -> bool:
        """Whether x needs nothing but the kernel: no gradient, no autocast, no conversion and no error message."""
        return (
            x.dtype in _DTYPES
            and x.is_cpu
            and x.ndim > 0
            and x.shape[-1] == self.k
            and not torch.is_autocast_enabled("cpu")
            and not (
                torch.is_grad_enabled() and (x.requires_grad or (self.sources[2] is not None and self.sources[2].requires_grad))
            )
        )

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, *self.arguments)


def prepare(
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    k: int,
    layout: str,
    act_bits: int | None,
    act_granularity: str,
    eps: float,
) -> PreparedLinear | None:
    """A `PreparedLinear`, or None where the compiled kernels do not serve or a tensor does not count its versions."""
    tensors = [t for t in (packed, scale, bias) if t is not None]
    if act_bits is None or any(type(t) not in (Tensor, torch.nn.Parameter) or not t.is_cpu or t.is_inference() for t in tensors):
        return None
    if k > MAX_WIDTH or not compiled():
        return None
    return PreparedLinear(packed, scale, bias, k, layout, act_granularity, eps)


def _latent_codes(w: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(t, scale, tiles, scale as the kernels read it) of a latent weight, kept until the weight changes."""
    found, token = _latent_weights.get((w,), *arguments)
    if found is not None:
        return found
    t, scale = quantize_weight(w, *arguments)
    tiles = torch.ops.qat.cpu_tile_codes(t.contiguous(), scale.shape[1])
    return _latent_weights.put(token, (t, scale, tiles, _tile_scale(scale, t.shape[0])))


def bitlinear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: str,
    scale: str,
    granularity: str,
    group_size: int | None,
    scale_dtype: str,
    act_bits: int | None,
    act_granularity: str,
    eps: float,
    backward: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, k = weight.shape
    arguments = scheme, scale, granularity, group_size, scale_dtype
    if act_bits is None or not _serves(x, k) or weight.numel() == 0:
        return reference.bitlinear(x, weight, bias, *arguments, act_bits, act_granularity, eps, backward)
    t, w_scale, tiles, tile_scale = _latent_codes(weight, *arguments, eps)
    y, x_q, x_scale = torch.ops.qat.cpu_bitlinear(
        _narrow(x), tiles, tile_scale, _bias(bias), n, k, w_scale.shape[1], act_granularity == "tensor", eps
    )
    # Views: an op's results belong to its caller, the cache keeps its own tensors.
    return y.to(x.dtype), x_q, x_scale, t.view(t.shape), w_scale.view(w_scale.shape)


def quantized_matmul(x: Tensor, t: Tensor, eps: float) -> Tensor:
    n, k = t.shape
    if t.numel() == 0 or not _serves(x, n):
        return reference.quantized_matmul(x, t, eps)
    tiles, token = _transposed_codes.get((t,))
    if tiles is None:
        tiles = _transposed_codes.put(token, torch.ops.qat.cpu_tile_codes(t.t().contiguous(), 1))
    return torch.ops.qat.cpu_linear(_narrow(x), tiles, torch.ones(1), None, k, n, 1, False, False, eps).to(x.dtype)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype not in _DTYPES or codes.numel() == 0 or not compiled():
        return reference.dequantize(codes, scale, dtype)
    groups = scale.shape[-1]
    if scale.numel() > 1:
        scale = scale.expand(*codes.shape[:-1], groups)
    rows = codes.contiguous().view(-1, codes.shape[-1] // groups)
    return torch.ops.qat.cpu_dequantize(rows, scale.reshape(-1).contiguous(), _DTYPES.index(dtype)).view(codes.shape)


KERNELS = {
    "dequantize": dequantize,
    "quantize_activation": quantize_activation,
    "quantize_weight": quantize_weight,
    "packed_linear": packed_linear,
    "bitlinear": bitlinear,
    "quantized_matmul": quantized_matmul,
}
