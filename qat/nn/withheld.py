"""A weight that can be asked for its shape, dtype and device but not for its values: there are none.

Models ask their layers for these (T5: `self.wo.weight.dtype`) and transformers marks parameters, so a packed layer must have a
`weight`. Whoever multiplies by it meant the float weight, which a packed layer has not: that is an error with the layer's name.
Rejected: NaN, which runs through a model and into a file without a word; a tensor on `meta`, whose device is another and whose
errors speak of devices.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_LIKE = (
    _aten.empty_like.default,
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.full_like.default,
    _aten.rand_like.default,
    _aten.randn_like.default,
    _aten.new_empty.default,
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
)
"""What needs a tensor's shape, dtype and device only."""


class WithheldWeight(Tensor):
    """Shape, dtype and device of a float weight. Any operation on its values raises ValueError."""

    layer: str

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, layer: str) -> WithheldWeight:
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        weight.layer = layer
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark: GPT-2 initializes by this name
        return weight

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _LIKE and isinstance(args[0], cls):
            return func(torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device), *args[1:], **(kwargs or {}))
        if func is _aten.detach.default:  # `.data`, which is asked for the same
            return cls(args[0].shape, args[0].dtype, args[0].device, args[0].layer)
        raise _no_values(_first(cls, (*args, *(kwargs or {}).values())).layer)

    def tolist(self) -> Any:
        """Raises ValueError: there are no values."""
        raise _no_values(self.layer)

    def numpy(self, *, force: bool = False) -> Any:
        """Raises ValueError: there are no values."""
        raise _no_values(self.layer)

    def data_ptr(self) -> int:
        """Raises ValueError: there is no memory."""
        raise _no_values(self.layer)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"WithheldWeight(shape={list(self.shape)}, dtype={self.dtype}, device={self.device}, layer={self.layer!r})"


@torch.library.custom_op("qat::withheld_weight", mutates_args=())
def traced(packed: Tensor, shape: Sequence[int], dtype: torch.dtype, layer: str) -> Tensor:
    """What a compiler traces in place of a WithheldWeight, whose class it does not know.

    It gets shape, dtype and device of the result. What else a graph does with it raises when it runs, as the result is withheld,
    too; inductor's kernels read memory without asking, so for them this raises: they call it only where values are read.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch._inductor.output_code":
            raise _no_values(layer)
        frame = frame.f_back
    return WithheldWeight(shape, dtype, packed.device, layer)


@traced.register_fake
def _(packed: Tensor, shape: Sequence[int], dtype: torch.dtype, layer: str) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def _first(kind: type[WithheldWeight], values: Sequence[Any]) -> WithheldWeight:
    for value in values:
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, kind):
                return item
    raise AssertionError("called without a withheld weight")


def _no_values(layer: str) -> ValueError:
    return ValueError(
        f"{layer or 'a packed layer'}: the weight's values were read, but a packed layer has none outside its own forward"
        f" (dequantize() computes them); whatever multiplies by this weight itself was never quantized:"
        f" leave the layer out of the conversion, by exclude or by giving convert a probe"
    )
