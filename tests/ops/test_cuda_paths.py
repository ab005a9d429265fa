"""The shapes of the tests on a GPU reach every kernel and both ways to write its output: by arithmetic alone, nothing runs.

The launchers choose for each shape as they would on a device, and the launch is only noted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from device_shapes import ACTIVATIONS, DECODE, INTEGERS, PREFILL, TRAINING, WEIGHTS
from emulator import (
    DTYPES,
    GRANULARITIES,
    Emulator,
    Linear,
    Output,
    PackedLinear,
    QuantizeActivation,
    QuantizeWeight,
    kernel_names,
    plan,
)

Shape = tuple[int, int, int, int]
SMS = 132  # of the emulation's device
SOMEWHERE = 1 << 20  # an aligned address that nothing reads
NORM = "quantize_rows<.*, true>"  # behind a norm: no op asks for it


@pytest.fixture
def dry(gpu: Emulator) -> Iterator[Emulator]:
    gpu.dry(True)
    gpu.launched()
    yield gpu
    gpu.dry(False)


def packed(gpu: Emulator, shape: Shape, kind: int) -> set[str]:
    m, n, k, groups = shape
    out = Output(SOMEWHERE, kind, SOMEWHERE, groups, None)
    scratch = (SOMEWHERE,) * 4
    gpu.run("run_packed_linear", PackedLinear(SOMEWHERE, False, 1e-5, SOMEWHERE, m, n, k, groups, out, *scratch, False))
    return gpu.launched()


def trained(gpu: Emulator, shape: Shape, kind: int) -> set[str]:
    m, n, k, groups = shape
    out = Output(SOMEWHERE, kind, SOMEWHERE, groups, None)
    gpu.run("run_linear", Linear(SOMEWHERE, SOMEWHERE, SOMEWHERE, m, n, k, groups, out, False, SOMEWHERE))
    return gpu.launched()


def integers(gpu: Emulator) -> set[str]:
    for m, n, k in INTEGERS:
        out = Output(SOMEWHERE, 0, None, 0, None)
        gpu.run("run_linear", Linear(SOMEWHERE, None, SOMEWHERE, m, n, k, 1, out, True, SOMEWHERE))
    return gpu.launched()


def linears(gpu: Emulator, whole: bool | None = None) -> set[str]:
    """What the linears launch; of all shapes, or of those whose rows of y are, or are not, whole units of 8 elements."""
    found = set[str]()
    for kind in range(3):
        for call, shapes in ((packed, DECODE + PREFILL), (trained, TRAINING)):
            for shape in shapes:
                if whole is None or (shape[1] % 8 == 0) == whole:
                    found |= call(gpu, shape, kind)
    return found


def quantizers(gpu: Emulator) -> set[str]:
    for kind in range(len(DTYPES)):
        for m, k in ACTIVATIONS:
            outputs = SOMEWHERE, SOMEWHERE, SOMEWHERE, SOMEWHERE
            gpu.run("run_quantize_activation", QuantizeActivation(SOMEWHERE, kind, m, k, False, 1e-5, None, 0, *outputs))
        for granularity, n, k, size in WEIGHTS:
            options = GRANULARITIES.index(granularity), 0, False, 0, 1e-5
            groups = k // size if size else 1
            addresses = SOMEWHERE, None, SOMEWHERE, SOMEWHERE
            gpu.run("run_quantize_weight", QuantizeWeight(SOMEWHERE, kind, n, k, groups, *options, *addresses))
    return gpu.launched()


def all_of(gpu: Emulator, *names: str) -> set[str]:
    kernels = [name for name in kernel_names(gpu.library._name).values() if ")::" not in name]  # which is inside of one
    return {name for name in kernels if name.partition("<")[0] in names and "<" in name}


# what is taken without wgmma, and with it
KERNELS = {"0": ("decode_kernel", "gemm_kernel", "add_kernel"), "1": ("decode_kernel", "hopper_kernel", "add_kernel")}


@pytest.mark.parametrize("wgmma", KERNELS)
def test_every_matmul_has_a_test_on_a_device(dry: Emulator, monkeypatch: pytest.MonkeyPatch, wgmma: str) -> None:
    monkeypatch.setenv("QAT_CUDA_WGMMA", wgmma)
    wanted = all_of(dry, *KERNELS[wgmma])
    assert wanted and wanted - linears(dry) - integers(dry) == set()
    many = {name for name in wanted if not name.startswith("decode") and name != "add_kernel<int>"}
    for whole in (True, False):  # y is written by 16 bytes, or by elements
        assert many - linears(dry, whole) == set()


# M, N, groups -> the tile's rows and columns, on 132 multiprocessors: what is left idle costs more than a smaller tile
TILES = {
    (2048, 13824, 1): "128, 256",
    (512, 13824, 1): "128, 256",  # 216 blocks: 2 each; of the medium tile 4, which are slower
    (256, 13824, 1): "128, 256",  # 108 blocks at once; 216 of the medium tile would come one after another on most
    (1024, 3840, 1): "128, 256",
    (128, 13824, 1): "128, 128",
    (64, 13824, 1): "64, 64",
    (512, 2560, 1): "64, 64",
    (1024, 2560, 1): "64, 64",  # 640 blocks, 5 each; 80 of the large tile leave 52 multiprocessors idle
    (2048, 13824, 4): "128, 128",
    (64, 2560, 4): "64, 64",
}


@pytest.mark.parametrize("shape", TILES, ids=str)
def test_tiles_fill_the_device(dry: Emulator, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]) -> None:
    monkeypatch.setenv("QAT_CUDA_WGMMA", "0")
    m, n, groups = shape
    for call in (packed, trained):
        (name,) = (one for one in call(dry, (m, n, 2560, groups), 1) if one.startswith("gemm"))
        assert f"Shape<{TILES[shape]}," in name


def test_splits_of_every_tile_have_a_test_on_a_device(gpu: Emulator) -> None:
    found = [plan(gpu, SMS, *shape) for shape in PREFILL + TRAINING]
    assert {tile for tile, splits in found if splits > 1} == {"small", "medium", "large"}


def test_every_quantizer_has_a_test_on_a_device(dry: Emulator) -> None:
    wanted = all_of(dry, "quantize_rows", "quantize_shared_rows", "quantize_all", "measure")
    assert {name for name in wanted - quantizers(dry) if not re.match(NORM, name)} == set()
