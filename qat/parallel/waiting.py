"""The device that computes beside this process: reading a value there is waiting for everything that was asked of it before.

A training step reads none, so that it is asked for ahead of the device; what must be known is sent, and read when it has come.
"""

from __future__ import annotations

import torch
from torch import Tensor


def waits(x: Tensor) -> bool:
    """Whether reading a value of x waits for its device. A CPU has computed it by now."""
    return not x.is_cpu


class Sent:
    """A number [] on its way here."""

    def __init__(self, x: Tensor) -> None:
        self._value = x.detach().to("cpu", non_blocking=True)
        self._event = torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None

    def arrived(self) -> bool:
        """Whether it can be read without waiting."""
        return self._event is None or self._event.query()

    def read(self) -> float:
        """Its value; waits for it if it has not arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.item()
