"""What started this process, as its environment says: torchrun, srun, or nobody, so that it is alone."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

from qat.terminal.stage import quietly

_LATER, _WRONG = 10.0, 2
"""Seconds in which the first process has printed what is wrong, on a machine that is busy; the exit code of that."""
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def by_torchrun() -> bool:
    """Whether torch's launcher started it."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def by_srun() -> bool:
    """Whether it is one of several tasks of a SLURM step; a batch script's own process is none."""
    return "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def begun() -> bool:
    """Whether there are processes already, of which this is one."""
    return by_torchrun() or by_srun()


def nodes_and_devices() -> tuple[int, int]:
    """How many nodes there are, and processes on each."""
    if not begun():
        return 1, 1
    if not by_torchrun():
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return nodes, int(os.environ["SLURM_NTASKS"]) // nodes
    size = int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return size // local, local


@contextmanager
def given() -> Iterator[None]:
    """What torch.distributed reads of the environment, where SLURM says it in other words."""
    if by_torchrun() or not by_srun():
        yield
        return
    from lightning.fabric.plugins.environments import SLURMEnvironment

    slurm, before = SLURMEnvironment(auto_requeue=False), {name: os.environ.get(name) for name in OF_RANKS}
    nodes, devices = nodes_and_devices()
    found = (slurm.global_rank(), slurm.local_rank(), nodes * devices, devices, slurm.main_address, slurm.main_port)
    os.environ |= {name: str(value) for name, value in zip(OF_RANKS, found, strict=True)}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def silent(when: bool = True) -> Iterator[None]:
    """Nothing is printed within, where `when` says so: another process prints the same."""
    if not when:
        yield
        return
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(nowhere))
        stack.enter_context(redirect_stderr(nowhere))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(quietly())
        yield


def hush() -> None:
    """Let only the first process print from here to its end: all of them are given the same command line.

    DDP would warn on each of them of a search for unused parameters that found none; torch reads how much it says when imported.
    """
    if begun():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not speaks():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def speaks() -> bool:
    """Whether it is the first, or the only one."""
    return not begun() or os.environ["RANK" if by_torchrun() else "SLURM_PROCID"] == "0"


def after_first(code: int) -> None:
    """Let the first process end first with this code: a launcher ends all others with the first one that fails."""
    if code == _WRONG and not speaks():
        time.sleep(_LATER)  # or until the launcher's signal
