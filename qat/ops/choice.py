"""Which kernels a device takes: compiled where they can be had, else the reference, and never silently."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from qat.config.flags import VERBOSE
from qat.ops.build.store import BuildError
from qat.quantizers import QUANTIZERS
from qat.quantizers.record import Quantizer

FROM = " from "
"""In the words of compiled kernels, before the file that they come from."""


@dataclass(frozen=True)
class Status:
    """Which kernels a device has, and why."""

    kernels: str
    why: str

    @property
    def short(self) -> str:
        """`why` without the file that compiled kernels come from, and what they leave to pure torch: that is for -v."""
        return self.why.partition(FROM)[0] if self.kernels == "compiled" else self.why


def choose(device: str, load: Callable[[], str]) -> Status:
    """`load` loads the device's kernels and describes them, or raises BuildError; QAT_KERNELS overrides.

    One line on stderr says what was taken, and why.

    Raises:
        ValueError: an unknown QAT_KERNELS.
        RuntimeError: QAT_KERNELS=compiled, but there are none.
    """
    found = _find(device, load)
    said = found.why if os.environ.get(VERBOSE) else found.short
    print(f"qat: {found.kernels} {device} kernels: {said}", file=sys.stderr, flush=True)
    return found


def _find(device: str, load: Callable[[], str]) -> Status:
    wish = os.environ.get("QAT_KERNELS", "auto")
    if wish not in ("auto", "compiled", "reference"):
        raise ValueError(f"QAT_KERNELS={wish!r} is not allowed; choose one of auto, compiled, reference")
    if wish == "reference":
        return Status("reference", "QAT_KERNELS=reference")
    try:
        return Status("compiled", load())
    except BuildError as error:
        if wish == "compiled":
            raise RuntimeError(f"QAT_KERNELS=compiled, but there are no compiled {device} kernels: {error}") from error
        return Status("reference", str(error))


def why_left(device: str, serves: Callable[[Quantizer], bool]) -> str:
    """What a device's kernels serve, for people."""
    names = [name for name, record in QUANTIZERS.items() if serves(record)]
    return f"the compiled {device.upper()} kernels serve {', '.join(names)}"


def say_left(device: str, weight: str, record: Quantizer, serves: Callable[[Quantizer], bool]) -> None:
    """Say on stderr, once a process, that a quantizer runs in pure torch, where a device's kernels do not declare it."""
    if not serves(record):
        _say_once(f"qat: quant.weight={weight} runs in pure torch: {why_left(device, serves)}")


@cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
