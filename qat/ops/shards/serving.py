"""Which weights can travel as codes, a fact of their quantizer's record, and how many bytes they are then."""

from __future__ import annotations

from qat.config import QuantConfig
from qat.ops.bits.kept import in_bits
from qat.ops.options import WeightOptions
from qat.quantizers.latent import record_of


def unfit(o: WeightOptions) -> str | None:
    """Why a weight quantized so must travel as it is, for people; None where its codes can travel in its place.

    A row of scales that are one a channel or group is a row of the shard, so any record will do that needs nothing else. Of
    scales that are one a tensor a shard must take its codes with what can be summed over shards.
    """
    record = record_of(o)
    if record.parameters:
        return f"{' and '.join(record.parameters)} of its quantizer change beside the weight"
    if record.gradient is not None:
        return "the gradient of its quantizer needs the weight itself"
    if record.bias is not None:
        return "its quantizer adds to the bias what it takes from the weight itself"
    if o.granularity != "tensor":
        return None
    if record.part is None or not record.statistical:
        return "it has one scale, which its quantizer takes of the whole weight"
    return None if o.scale == "absmean" else f"it has one scale, and {o.scale} is no sum over its parts"


def row_bytes(config: QuantConfig, k: int) -> int:
    """Bytes of a row [k] of such a weight: codes as they are kept, and scales, where a row has some of its own."""
    width = config.planes * k
    groups = {"tensor": 0, "channel": 1, "group": k // (config.group_size or k)}[config.granularity]
    return (-(-width // 4) if in_bits(config.quantizer) else width) + 4 * config.planes * groups


def sum_bytes(config: QuantConfig) -> int:
    """Bytes that all devices add up for it before: two sums in float64 for a weight of one scale."""
    return 16 if config.granularity == "tensor" else 0
