"""A tensor that several devices hold a part of each: its part here, the whole of it, and a part of a whole one.

Parts are consecutive rows, as FSDP2 cuts them: ceil(N / devices) on each, so the last ones may have fewer or none. A tensor that
is no DTensor is its own part and its own whole, so that what asks here runs on one device, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
