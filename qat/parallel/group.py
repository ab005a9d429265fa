"""The group of processes: joined by what torchrun, or who else started them, left in the environment.

There are two. torch's default one moves tensors, on GPUs by NCCL. The other, of gloo, carries what ranks say to each other: it
needs no GPU, so nothing waits for one, and rank 0 may tokenize or measure for hours while the others wait, which NCCL's timeout
would end after half an hour. A process that died is noticed in both at once, as its connections close.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Lost(RuntimeError):
    """Another process of the run ended without having waited for this one."""


_PATIENCE = timedelta(days=2)
_LAST_WORDS = "qat last words"
_known: dict[Any, Any] = {}
"""The default group -> that of gloo; one entry."""


def several() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def talk() -> Any:
    """The group that ranks say things in; made when all of them first ask for it."""
    default = dist.group.WORLD
    if default not in _known:
        _known.clear()
        _known[default] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return _known[default]


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT speak of, on the GPU that LOCAL_RANK names.

    Nothing where they speak of one process, or this one has joined already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if gpu and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    talk()
    try:
        yield
    finally:
        _known.clear()
        with suppress(RuntimeError):  # of those that died before
            dist.destroy_process_group()


@contextmanager
def noticed() -> Iterator[None]:
    """`Lost`, with what the process that ended has said, in place of what torch says of its closed connections."""
    try:
        yield
    except RuntimeError as error:
        if not several() or isinstance(error, Lost) or not _SIGNS.search(f"{type(error).__name__} {error}"):
            raise
        raise Lost(last_word() or "a process of this run ended without a word; it was killed, perhaps for its memory") from error


_SIGNS = re.compile("gloo|nccl|connection|DistBackendError|DistNetworkError|socket", re.IGNORECASE)


def leave_word(text: str) -> None:
    """Say why this rank ends, for those who will find its connections closed; the first word stays."""
    if several():
        with suppress(RuntimeError):
            dist.distributed_c10d._get_default_store().compare_set(_LAST_WORDS, "", text)


def last_word() -> str | None:
    """Why a rank ended, where it said so within seconds."""
    if not several():
        return None
    store = dist.distributed_c10d._get_default_store()
    with suppress(RuntimeError):
        store.wait([_LAST_WORDS], timedelta(seconds=3))
        return str(store.get(_LAST_WORDS).decode())
    return None


def free_port() -> int:
    """A port of the loopback that nobody uses now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
