"""result.json from a run's first moment to its last, whatever ends it."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from torch import nn

import qat
from qat.config import TrainConfig
from qat.conversion.record import Conversion
from qat.formats.tensors import full_precision_bf16
from qat.reporting.result import RunResult
from qat.training.checkpoints import newest
from qat.training.signals import Interrupted


def new_result(config: TrainConfig, folder: Path, base: nn.Module, record: Conversion) -> RunResult:
    """A result with everything that is known before training."""
    result = RunResult(recipe=config.run.name, folder=str(folder))
    result.conversion = record.facts()
    result.bytes = {"full_precision_bf16": full_precision_bf16(base)}
    result.versions = versions()
    result.config_hash = config_hash(config)
    return result


def versions() -> dict[str, str]:
    """What a number depends on."""
    packages = {name: version(name) for name in ("torch", "lightning", "transformers", "numpy")}
    return {
        "qat": qat.__version__,
        "python": platform.python_version(),
        **packages,
        "machine": platform.processor() or platform.machine(),
    }


def config_hash(config: TrainConfig) -> str:
    """sha256 of the configuration without the folder it is written to, so equal work has equal hashes."""
    plain = asdict(config)
    plain.pop("run")
    plain.pop("resume")
    return hashlib.sha256(repr(sorted(plain.items())).encode()).hexdigest()[:16]


@contextmanager
def recording(result: RunResult, folder: Path) -> Iterator[None]:
    """Keep result.json readable: it says `failed: ...` when an error ends the run, and how to go on when a signal does."""
    start = time.perf_counter()
    result.save(folder)
    try:
        yield
    except Interrupted as signal:
        interrupted(result, folder, signal.number)
    except BaseException as error:
        result.status = f"failed: {error or type(error).__name__}"
        raise
    finally:
        result.seconds_total = time.perf_counter() - start
        result.save(folder)


def interrupted(result: RunResult, folder: Path, signal: int, where: str = "") -> None:
    """Say that a signal ended the run, and at which step it will go on."""
    found = newest(folder / "checkpoints")
    result.signal = signal
    result.status = f"interrupted {where}at step {found.step if found else 0}; continue with resume={folder}"
