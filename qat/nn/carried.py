"""A number that a schedule changes from step to step, as a tensor: torch.compile would recompile for each float."""

from __future__ import annotations

import torch
from torch import Tensor


def carried(value: float, carrier: Tensor | None, device: torch.device) -> Tensor:
    """The carrier, set to the value; a new one, float32 [], where there is none or it lies elsewhere."""
    with torch.inference_mode(False):
        if carrier is None or carrier.device != device:
            return torch.full((), value, dtype=torch.float32, device=device)
        return carrier.fill_(value)


def carried_share(name: str, value: float, carrier: Tensor | None, device: torch.device) -> Tensor | None:
    """`carried` for how much of something there is; None for all of it.

    Raises:
        ValueError: the value is not in 0 to 1.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is not allowed; it must be in 0 to 1")
    return None if value == 1 else carried(value, carrier, device)
