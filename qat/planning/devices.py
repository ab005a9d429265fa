"""Devices as records: memory and speeds from their makers' data sheets, any of them given anew by whoever knows better.

A data sheet says what a device does at best. `share` is the part of its peak that a training reaches; .4 is what well-kept
trainers of language models report for bf16, and it is an assumption here, stated beside the hours that follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What counts of a device, in bytes and seconds."""

    name: str
    memory: float
    """Bytes that a process can have."""
    flops: float
    """Peak of bf16 matmuls, dense."""
    flops32: float
    """Peak of float32 matmuls."""
    link: float
    """Bytes a second that it sends to devices of its node."""
    wire: float
    """Bytes a second that it sends to other nodes."""
    share: float = 0.4
    """Of the peak, that is reached."""


DEVICES = {
    one.name: one
    for one in (
        Device("b200", 178 * GIB, 2250e12, 75e12, 900e9, 50e9),
        Device("h200", 139 * GIB, 989e12, 67e12, 450e9, 50e9),
        Device("h100", 79 * GIB, 989e12, 67e12, 450e9, 50e9),
        Device("a100", 79 * GIB, 312e12, 19.5e12, 300e9, 25e9),
        Device("a100-40", 39 * GIB, 312e12, 19.5e12, 300e9, 25e9),
        Device("l40s", 44 * GIB, 362e12, 91e12, 25e9, 12.5e9),
        Device("4090", 23.5 * GIB, 165e12, 82e12, 25e9, 3e9),
        Device("cpu", 64 * GIB, 1e12, 1e12, 10e9, 1e9),
    )
}
"""By name. `link`: NVLink, or PCIe 4 with 16 lanes; `wire`: 400, 200, 100 or 25 Gbit/s a device; `cpu`: about 16 cores."""
_UNITS = {"memory": GIB, "flops": 1e12, "flops32": 1e12, "link": 1e9, "wire": 1e9, "share": 1.0}
"""Of what is typed: GiB, TFLOP/s, GB/s."""


def device(text: str) -> Device:
    """`h100`, or `h100,wire=25,memory=94`: a record with some values given anew, in GiB, TFLOP/s and GB/s.

    Raises:
        ValueError: no such device or value.
    """
    name, *given = text.lower().split(",")
    if name not in DEVICES:
        raise ValueError(f"--on {name} is no device known here; it must be one of {', '.join(DEVICES)}")
    values: dict[str, Any] = dict(_value(one) for one in given)
    return replace(DEVICES[name], **values)


def _value(text: str) -> tuple[str, float]:
    key, _, value = text.partition("=")
    names = [field.name for field in fields(Device) if field.name != "name"]
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if key not in names or not 0 < number < 1e9 or (key == "share" and number > 1):
        units = "GiB, TFLOP/s, GB/s, and share at most 1"
        raise ValueError(f"--on ...,{text} is not allowed; it must be KEY=NUMBER of {', '.join(names)} ({units})")
    return key, number * _UNITS[key]
