"""A device's rows of a latent weight, which FSDP2 gathers as codes and scales in place of floats.

FSDP2 asks a tensor that has `fsdp_pre_all_gather` for what it sends, and hands `fsdp_post_all_gather` what came of all devices.
Here that is what the layer would make of the whole weight itself: codes of 2 bits, as they are kept for the backward pass, and
scales, a row of them for a row of the weight. One scale a tensor is not sent: all devices know it (`sums`). All of it is equal to
the bit to gathering 32-bit floats and quantizing them on every device, which a gather of bfloat16 is not.

The rows stay an ordinary tensor to everyone else: optimizers, checkpoints and collectives see the same memory, and whatever they
compute with it is plain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.config import QuantConfig
from qat.ops import cpu
from qat.ops.bits.kept import keep
from qat.ops.options import WeightOptions, weight_options
from qat.ops.shards.gathered import GatheredCodes
from qat.ops.shards.sums import Pooled, local_sums, pooled
from qat.quantizers.record import resolve


@dataclass
class Place:
    """What a device's rows need to know of the whole weight [N, K]: its layer, shape, and how many devices have rows of it."""

    name: str
    config: QuantConfig
    shape: torch.Size
    devices: int
    coded: bool = True
    """Whether the layer needs no more than codes now; else the rows travel as they are."""
    mine: Tensor | None = None
    """`local_sums` of the rows here, where the weight has one scale; and what they and the other devices' make:"""
    whole: Pooled | None = None
    mark: int | None = None
    """The fingerprint of the rows that those are of, where there is one."""
    kept: tuple[Tensor, Tensor] | None = None
    """Codes and scale of the rows here, as the last forward pass sent them; the backward pass sends the same."""

    @property
    def options(self) -> WeightOptions:
        return WeightOptions(*weight_options(self.config))

    @property
    def pooled(self) -> bool:
        """Whether its codes are of a scale of all devices' rows."""
        return self.config.granularity == "tensor"

    @property
    def rows(self) -> int:
        """How many rows each device sends; the last ones may have fewer, or none."""
        return -(-self.shape[0] // self.devices)

    def begin(self, rows: Tensor) -> Tensor:
        """Before codes are taken of the rows as they are now: what is to be added up over devices."""
        self.mine, self.mark = local_sums(rows), cpu.fingerprint(rows)
        return self.mine

    def take(self, sums: Tensor) -> None:
        """The sums over all devices, of which those here were `mine`."""
        self.whole = pooled(sums, self.shape.numel(), self.options)


class ShardedLatent(Tensor):
    """Rows [n, K] of a latent weight in float32 that knows its place."""

    place: Place
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(rows: Tensor, place: Place) -> ShardedLatent:
        """The same memory."""
        found: ShardedLatent = Tensor._make_subclass(ShardedLatent, rows)
        found.place = place
        return found

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What this device sends, and the scale that all know."""
        rows, place = self.detach(), self.place
        if not place.coded:
            return (_padded(rows, place.rows),), None
        if place.kept is None or not _in_backward():
            place.kept = pooled_codes(rows, place) if place.pooled else own_codes(rows, place)
        codes, scale = place.kept
        sent = (codes,) if place.pooled else (codes, scale)
        return tuple([_padded(one, place.rows) for one in sent]), scale if place.pooled else None

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Tensor | None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The weight of all devices' rows. Where it was made before, its memory has been filled again."""
        n = self.place.shape[0]
        if not self.place.coded:
            return (outputs[0][:n], ()) if out is None else None
        if out is not None:
            assert isinstance(out, GatheredCodes)
            out.scale = out.scale if metadata is None else metadata
            return None
        scale = outputs[1][:n] if metadata is None else metadata
        return GatheredCodes(outputs[0][:n], scale, self.place.shape), ()


def _in_backward() -> bool:
    """Whether autograd runs a backward pass here, in which FSDP2 gathers once more."""
    return bool(torch._C._current_graph_task_id() != -1)


def own_codes(rows: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Codes as they are kept, and scales, of rows that have scales of their own."""
    twin = "quantize_weight_reference" if place.config.kernels == "reference" else "quantize_weight"
    t, scale = getattr(torch.ops.qat, twin)(rows, [], *place.options)
    return keep(t, place.config.quantizer, torch.ops.qat.pack_bits), scale


def pooled_codes(rows: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Likewise, of rows that share one scale with those of other devices.

    Raises:
        RuntimeError: the rows are not those that the scale was taken of.
    """
    if place.whole is None or place.mine is None:
        raise RuntimeError(_stale(place))
    if place.mark is None or place.mark != cpu.fingerprint(rows):
        _must_be(place.mine, local_sums(rows), place)
    record = place.config.quantizer
    assert record.part is not None
    t = resolve(record.part)(rows, place.whole.scale, place.whole.mean).to(torch.int8)
    return keep(t, record, torch.ops.qat.pack_bits), place.whole.scale


def _must_be(then: Tensor, now: Tensor, place: Place) -> None:
    """On a GPU without waiting for it; a NaN is for those who look for NaN."""
    same = ((then == now) | now.isnan()).all()
    if same.is_cuda:
        torch._assert_async(same, _stale(place))  # type: ignore[call-overload]
    elif not same:
        raise RuntimeError(_stale(place))


def _stale(place: Place) -> str:
    return f"the scale of {place.name} is not that of its weights now: run the whole model, not a part of it, after they changed"


def _padded(part: Tensor, rows: int) -> Tensor:
    """Rows [rows, ...] of which the first are these: all devices send as many bytes."""
    if part.shape[0] == rows:
        return part.contiguous()
    whole = part.new_zeros((rows, *part.shape[1:]))
    whole[: part.shape[0]] = part
    return whole
