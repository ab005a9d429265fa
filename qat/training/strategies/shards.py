"""A tensor that several devices hold a part of each: its part here, the whole of it, and a part of a whole one.

Parts are consecutive rows, as FSDP2 cuts them: ceil(N / devices) on each, so the last ones may have fewer or none. A tensor that
is no DTensor is its own part and its own whole, so that what asks here runs on one device, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def local(tensor: Tensor) -> Tensor:
    """This device's rows [n, ...], possibly none; they share their memory with the tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on this device; every device that holds a part must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def begins(tensor: Tensor) -> int:
    """How many elements of the whole tensor lie before this device's part."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh, rows = tensor.device_mesh, max(len(tensor), 1)
    return min(-(-rows // mesh.size()) * mesh.get_local_rank(), rows) * (tensor.numel() // rows)


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """The layer's own parameters are whole within, for those who read them; every device that holds parts must ask."""
    mine = dict(layer._parameters)
    for name, value in mine.items():
        if isinstance(value, DTensor):
            layer._parameters[name] = nn.Parameter(whole(value.detach()), requires_grad=False)
    try:
        yield
    finally:
        layer._parameters.update(mine)


def part(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """A copy of this device's rows of a whole tensor [N, ...], on the mesh's device; nothing is sent."""
    chunks, rank = tensor.detach().chunk(mesh.size(), dim=0), mesh.get_local_rank()
    rows = chunks[rank] if rank < len(chunks) else tensor.detach()[:0]
    return rows.to(mesh.device_type, copy=True).contiguous()


def divided(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """The tensor [N, ...], that every device has, as one of which each has its part."""
    rows = part(tensor, mesh)
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=_contiguous(tensor.shape))


def rows(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a tensor [N, ...] the rows of this device's part of `like` [N, ...]; one row [1, ...] for all of them stays."""
    if not isinstance(like, DTensor) or len(tensor) != len(like):
        return tensor
    return part(tensor, like.device_mesh)


def joined(part: Tensor, like: Tensor) -> Tensor:
    """The inverse of `rows`: the tensor [N, ...] of which each device has the rows of its part of `like`; all must ask."""
    if not isinstance(like, DTensor):
        return part
    shape = torch.Size((len(like), *part.shape[1:]))
    sent = part.to(torch.uint8) if part.dtype == torch.bool else part  # which gloo does not send
    found = DTensor.from_local(sent, like.device_mesh, [Shard(0)], run_check=False, shape=shape, stride=_contiguous(shape))
    return found.full_tensor().to(part.dtype)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
