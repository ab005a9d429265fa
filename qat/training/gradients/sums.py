"""Gradients of an update added in float64, so that their sum does not depend on who adds them, nor in which order.

Each way to share an update's batches out, on one device after another or on several at once, adds them in another order, and in
float32 each rounds otherwise. In float64 the order is lost in the one rounding to float32 at the end, as it is with the norm of
gradients (`clipping`). Sums are taken, and no means, whose division by three devices would round again.

Rejected: to let fsdp2 wait for its last batch, as ddp does. The two would be equal then, at 4 bytes a parameter of the whole
model on each device, and one process would still add in another order; so would three devices of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from qat.training.strategies.buffers import groups_of, held_by

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its older name


class Sums:
    """Of whole parameters: on one device, and with ddp, which adds over devices at the last batch."""

    def __init__(self) -> None:
        self._kept: dict[nn.Parameter, Tensor] = {}

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take a batch's gradients away, added to those of the batches before."""
        for parameter in parameters:
            if parameter.grad is not None:
                self._kept[parameter] = self._with(parameter, parameter.grad)
                parameter.grad = None

    def settle(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add the last batch's: gradients are those of the update."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = self._with(parameter, parameter.grad).to(parameter.dtype)
            elif parameter in self._kept:
                parameter.grad = self._kept.pop(parameter).to(parameter.dtype)

    def _with(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        before = self._kept.pop(parameter, None)
        return gradient.double() if before is None else before.add_(gradient)

    def over_devices(self, bucket: Any) -> Any:
        """DDP's hook (`register_comm_hook`): a bucket of gradients becomes the sum of all devices' batches."""
        mine = bucket.gradients()
        wide = [self._with(p, gradient).reshape(-1) for p, gradient in zip(bucket.parameters(), mine, strict=True)]
        added = dist.all_reduce(torch.cat(wide), async_op=True).get_future()  # type: ignore[union-attr]

        def rounded(found: Any) -> Tensor:
            for gradient, total in zip(mine, found.value()[0].split([one.numel() for one in mine]), strict=True):
                gradient.copy_(total.view_as(gradient))
            return bucket.buffer()  # type: ignore[no-any-return]

        return added.then(rounded)


class Reduced:
    """Of one of FSDP2's modules (`set_custom_reduce_scatter`): its gradients are the rounded sum of all batches so far.

    It begins anew where its parameters have no gradients. Those of the batches before, which FSDP2 would add to, are taken away.
    """

    def __init__(self, module: FSDPModule) -> None:
        self.module = module
        self.total: Tensor | None = None
        """float64, in the places of `output`."""
        self.output: Tensor | None = None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Called by FSDP2."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        """Called by FSDP2, with what this device has of all rows."""
        wide = torch.empty_like(output_tensor, dtype=torch.float64)
        _reduce_scatter(wide, input_tensor.double(), group=group)
        self.output, self.total = output_tensor, self._added(wide)
        output_tensor.copy_(self.total)

    def _added(self, wide: Tensor) -> Tensor:
        mine = [one.sharded_param for one in held_by(self.module)]
        if self.total is None or all(parameter.grad is None for parameter in mine):
            return wide
        assert self.total.shape == wide.shape, "a batch has gradients of other parameters than the one before"
        for parameter in mine:
            parameter.grad = None
        return wide.add_(self.total)

    def exact(self, gradient: Tensor) -> Tensor | None:
        """In float64 one of the gradients [...] here; None of another module's."""
        if self.total is None or self.output is None or self.output.data_ptr() != gradient.untyped_storage().data_ptr():
            return None
        return self.total.as_strided(gradient.size(), gradient.stride(), gradient.storage_offset())


def reduce_in_float64(shell: nn.Module) -> None:
    """Have a sharded model add its gradients over devices and batches so."""
    for module in shell.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(Reduced(module))  # type: ignore[arg-type]
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reducers(shell: nn.Module) -> list[Reduced]:
    """Of a sharded model those that `reduce_in_float64` gave it."""
    modules = (module for module in shell.modules() if isinstance(module, FSDPModule))
    found = (group._reduce_scatter_comm for module in modules for group in groups_of(module))
    return [one for one in found if isinstance(one, Reduced)]


@contextmanager
def aside(shell: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """A backward pass within is no batch of the update. Given is what rounded gradients [...] were before, where it is kept."""
    mine = reducers(shell)
    before = [(one.total, one.output) for one in mine]
    try:
        yield lambda gradient: next((found for one in mine if (found := one.exact(gradient)) is not None), gradient)
    finally:
        for one, (total, output) in zip(mine, before, strict=True):
            one.total, one.output = total, output
