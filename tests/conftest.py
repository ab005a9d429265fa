"""Every test starts from the same random numbers, uses its own cache and no network."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"


LONG = ("training", "devices", "faults", "formats", "serving", "test_")
"""Rooms of tests, and files, that take longest; what is left for the end is short, and all workers end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long ones first; files stay together (`--no-loadscope-reorder`, or xdist would take the files with most tests first)."""
    here = Path(__file__).parent

    def turn(item: pytest.Item) -> int:
        room = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        return next((n for n, long in enumerate(LONG) if room.startswith(long)), len(LONG))

    items.sort(key=turn)


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.setenv("QAT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    before = dict(os.environ)  # verbs set what holds for a whole process
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def shared() -> Path:
    """The folder of real models and text beside the project."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    return SHARED


@pytest.fixture(scope="session")
def pair() -> Iterator[Any]:
    """Two ranks that live as long as the tests do (`devices.pair.Pair`)."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    from devices.pair import Pair

    found = Pair()
    yield found
    found.close()


@pytest.fixture(scope="session")
def emulated_kernels() -> ctypes.CDLL:
    """The CUDA kernels, compiled for the CPU."""
    from emulator import COMPILER, load_kernels

    if COMPILER is None:
        pytest.skip("no C++ compiler to emulate the CUDA kernels with")
    return load_kernels()


@pytest.fixture
def gpu(emulated_kernels: ctypes.CDLL) -> Iterator[Any]:
    """An `Emulator` of a GPU."""
    from emulator import Emulator

    found = Emulator(emulated_kernels)
    yield found
    found.skip(None)
    found.free()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a character tokenizer, as a transformers folder; the MLP width 43 is odd on purpose."""
    from tiny import write_model

    return write_model(tmp_path_factory.mktemp("models") / "tiny", hidden_size=32, intermediate_size=43, num_hidden_layers=2)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 9,000 characters that a tiny model can learn."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["the cat sat.", "a dog ran,", "we see the sun.", "birds fly over the hill,"]
    file.write_text("\n".join(words[(i * i + i // 7) % 4] for i in range(600)))
    return file
