"""On which instruction sets and how many threads the tests of the compiled CPU kernels run."""

from __future__ import annotations

import pytest
import torch

from qat.ops import cpu


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`isa` is each of them: asked for here and not in the fixture, as the answer compiles the kernels."""
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", cpu.paths(), indirect=True)


@pytest.fixture
def isa(request):
    """Every instruction set that this CPU has a path for."""
    before = cpu.isa()
    cpu.select_isa(request.param)
    yield request.param
    cpu.select_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
