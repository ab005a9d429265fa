"""Say when something that can be merged is put over a BitLinear, such as a LoRA adapter.

The codes of a merged weight W + B A are those of the sum, and not the codes of W plus an adapter: the merged model computes
something else than the one that was trained. The merge itself cannot be seen (peft adds to `weight.data`), so the wrapping is
said, as torch tells of each module that becomes another's child.
"""

from __future__ import annotations

import sys
from functools import cache

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from qat.nn.bitlinear import BitLinear


def _look(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(child, BitLinear) and callable(getattr(type(parent), "merge", None)):
        _say(f"{type(parent).__module__}.{type(parent).__qualname__}")


@cache
def _say(wrapper: str) -> None:
    """Once a kind of wrapper."""
    print(
        f"qat: {wrapper} wraps a BitLinear: keep its adapter apart, for merging it changes the codes, and with them the model;"
        " to merge, do so into the full-precision model and convert that",
        file=sys.stderr,
    )


register_module_module_registration_hook(_look)
