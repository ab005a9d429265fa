"""Whether the CUDA kernels run on a device at all: asked when they are loaded, so that no first op fails."""

from __future__ import annotations

import torch

from qat.ops import reference
from qat.ops.build.store import BuildError


def probe(device: torch.device, failed: str) -> None:
    """Quantize and multiply a token: an old driver, or a library without an image for the device, fails here and not later.

    Raises:
        BuildError: the kernels do not run, or give another result than the reference.
    """
    x, scale = torch.arange(-32.0, 32.0).reshape(1, 64), torch.ones(1, 1)
    packed = torch.arange(64, dtype=torch.uint8).reshape(4, 16) & 0x15  # fields of 0 and 1: codes of -1 and 0
    y = reference.packed_linear(x, packed, scale, None, 64, "2bit", 8, "token", 1e-5)
    wanted = *reference.quantize_activation(x, "token", 1e-5), y
    try:
        codes, x_scale = torch.ops.qat.cuda_quantize_activation(x.to(device), False, 1e-5)
        y = torch.ops.qat.cuda_packed_linear(x.to(device), packed.to(device), scale.to(device), None, 64, False, 1e-5, False)
        found = codes.cpu(), x_scale.cpu(), y.cpu()
    except RuntimeError as error:
        raise BuildError(f"{failed}: {str(error).strip().partition(chr(10))[0]}") from error
    if not all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
        raise BuildError(f"{failed}: a probe gave other bits than the reference")
