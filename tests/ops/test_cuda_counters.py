"""What kernels ask of memory, counted by the emulation: sectors of 32 bytes of global memory, and wavefronts of shared memory.

Every figure here is arithmetic of the shape, so that a load that is not coalesced, or a lane that meets another in a bank, shows.
"""

from __future__ import annotations

import pytest
import torch
from emulator import Emulator, expected_linear, linear, packed_linear, problem, quantize_activation
from kernel_checks import EPS, same, tokens

from qat.quantizers import activations

SECTOR = 32


def test_each_count_is_of_what_is_met(gpu: Emulator) -> None:
    """A warp's loads of 16 bytes: side by side, every other, all the same; and its words in one bank, or in two."""
    with gpu.count():
        gpu.run("run_counted", gpu.put(torch.zeros(1024)))
    found = [tuple(map(int, line.split()[2:])) for line in gpu.counts]
    assert found == [(16, 16), (32, 16), (1, 16), (1, 1), (32, 1), (2, 1), (4, 4), (8, 4)]


def no_conflicts(gpu: Emulator, *files: str) -> None:
    met, least = gpu.counted("shared", *files)
    assert met == least > 0, gpu.counts


@pytest.mark.parametrize("tile", ["small", "medium", "large"])
@pytest.mark.parametrize("packed", [False, True])
def test_gemm(gpu: Emulator, packed: bool, tile: str) -> None:
    """Each block reads its rows of both operands once; 2-bit rows by 16 bytes a stage, which are half a sector."""
    rows, columns = {"small": (64, 64), "medium": (128, 128), "large": (128, 256)}[tile]
    m, n, k = 256, 512, 320
    p = problem(m, n, k)
    with gpu.count():
        same(packed_linear(gpu, p, tile=tile) if packed else linear(gpu, p, tile), expected_linear(p))
    blocks = (m // rows) * (n // columns)
    weights = columns * k // 64 if packed else columns * k // SECTOR
    assert gpu.counted("global", "operands.h")[0] == blocks * (rows * k // SECTOR + weights)
    no_conflicts(gpu, "operands.h", "gemm.cu", "outputs.h")


@pytest.mark.parametrize("packed", [False, True])
def test_wgmma(gpu: Emulator, packed: bool) -> None:
    m, n, k = 256, 128, 512
    p = problem(m, n, k)
    with gpu.count():
        same(packed_linear(gpu, p, tile="hopper") if packed else linear(gpu, p, "hopper"), expected_linear(p))
    assert gpu.counted("global", "operands.h")[0] == (m * k + n * k // (4 if packed else 1)) // SECTOR
    no_conflicts(gpu, "operands.h", "gemm_hopper.cu", "outputs.h")


@pytest.mark.parametrize(("m", "groups"), [(1, 1), (7, 1), (16, 1), (1, 4), (7, 4)])
def test_decode(gpu: Emulator, m: int, groups: int) -> None:
    """Every byte of the weights is read once, by whole sectors, and no lane waits for a bank."""
    n, k = 64, 2048
    p = problem(m, n, k, groups)
    with gpu.count():
        same(packed_linear(gpu, p), expected_linear(p))
    copies = gpu.counted("global", "decode_input.h")[0]
    tokens_read = 0 if m == 1 else n // 16 * m * k // SECTOR  # by each block of 16 rows
    assert copies == n * k // 4 // SECTOR + tokens_read
    no_conflicts(gpu, "decode.cu", "decode_input.h")


@pytest.mark.parametrize(("dtype", "k"), [(torch.bfloat16, 2560), (torch.float32, 576), (torch.bfloat16, 6912)])
def test_quantize_activation_reads_x_once(gpu: Emulator, dtype: torch.dtype, k: int) -> None:
    x = tokens(9, k, dtype)
    with gpu.count():
        same(quantize_activation(gpu, x, per_tensor=False)[0], activations.activation_codes(x, "token", EPS)[0])
    assert gpu.counted("global") == (x.numel() * x.element_size() // SECTOR,) * 2
