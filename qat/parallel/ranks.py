"""What ranks tell each other. On one process all of it is what it would be without ranks, and costs nothing.

Every word goes in an envelope that may hold an exception instead: a rank that fails says so wherever the others wait for it, and
all raise, instead of one that ends and others that wait. That holds where ranks do nothing but talk (`as_one`); between them, in
a training step, they wait for gradients, and what must stop all of them is asked for with `together`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qat.parallel.group import noticed, several, talk

T = TypeVar("T")
_told = "_told_to_all_ranks"


@dataclass(frozen=True)
class _Envelope:
    value: Any = None
    failure: BaseException | None = None


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if several() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if several() else 1


def first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def first_here() -> bool:
    """Whether this is the first process of its machine, which writes what is kept on each."""
    return not several() or os.environ.get("LOCAL_RANK", f"{rank()}") == "0"


def gathered(value: T) -> list[T]:
    """Every rank's value, in order of ranks, on all of them; what can be pickled.

    Raises:
        ValueError: (or what it was) another rank failed, in `as_one` or elsewhere in this module.
    """
    return [envelope.value for envelope in _exchanged(_Envelope(value))]


def shared(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, where alone it is called, on all of them; an exception of it is raised on all."""
    if not several():
        return make()
    return _exchanged(_attempt(make) if first() else _Envelope())[0].value  # type: ignore[no-any-return]


def failed(error: BaseException) -> None:
    """Raise this rank's error on all, where the others say something next, or fail as well."""
    _exchanged(_Envelope(failure=error))


def most(value: int) -> int:
    """The largest of all ranks' values. It is cheap enough for every step, and waits for no GPU."""
    if not several():
        return value
    found = torch.tensor([value])
    with noticed():
        dist.all_reduce(found, dist.ReduceOp.MAX, group=talk())
    return int(found.item())


def together(flag: bool) -> bool:
    """Whether any rank says so; as cheap as `most`."""
    return bool(most(int(flag)))


def sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum over ranks of each tensor [...], float64 and on its device; one exchange for all. They lie on one device."""
    found = [tensor.detach().double() for tensor in tensors]
    if not several() or not found:
        return found
    flat = torch.cat([one.reshape(-1) for one in found])
    with noticed():
        dist.all_reduce(flat, group=None if flat.is_cuda else talk())
    parts = flat.split([one.numel() for one in found])
    return [part.view_as(one) for part, one in zip(parts, found, strict=True)]


def in_turn(own: Sequence[T]) -> list[T]:
    """The parts of a list that ranks shared out, rank r having r, r + W, r + 2 W, ..., in the list's order, on all of them."""
    everyone = gathered(list(own))
    return [part[place] for place in range(max(map(len, everyone))) for part in everyone if place < len(part)]


def same(value: Any, what: str) -> None:
    """Raise ValueError on all ranks where they do not have the same value; `what` is its name in the plural.

    The values are what the message shows: short ones, or hashes.
    """
    found = gathered(value)
    if other := next((i for i, one in enumerate(found) if one != found[0]), None):
        raise ValueError(f"the processes of this run have different {what}: rank 0 {found[0]}, rank {other} {found[other]}")


@contextmanager
def as_one() -> Iterator[None]:
    """A part that all ranks go through, or none: an exception of one of them is raised on all.

    Nothing within may wait for other ranks but by what is in this module.
    """
    if not several():
        yield
        return
    with _failing_on_all():
        yield
    gathered(None)


@contextmanager
def before_others() -> Iterator[None]:
    """Rank 0 first, then the others, which find in a cache what it has made; an exception of it is raised on all."""
    if not several():
        yield
        return
    if not first():
        gathered(None)
        with as_one():
            yield
        return
    with _failing_on_all():
        yield
    with as_one():
        gathered(None)


@contextmanager
def _failing_on_all() -> Iterator[None]:
    """Tell the others of an exception, once, wherever they wait."""
    try:
        yield
    except BaseException as error:
        if not getattr(error, _told, False):
            _exchanged(_Envelope(failure=error))
        raise


def _attempt(make: Callable[[], Any]) -> _Envelope:
    try:
        return _Envelope(make())
    except BaseException as error:
        return _Envelope(failure=error)


def _exchanged(mine: _Envelope) -> list[_Envelope]:
    """All envelopes; raises where one of them, this one too, holds an exception."""
    if not several():
        found = [mine]
    else:
        found = [_Envelope()] * size()
        with noticed():
            dist.all_gather_object(found, _sendable(mine), group=talk())
    failed = next((i for i, one in enumerate(found) if one.failure is not None), None)
    if failed is None:
        return found
    raise _marked(mine.failure or _abroad(found[failed].failure, failed, len(found)))


def _sendable(envelope: _Envelope) -> _Envelope:
    """Exceptions travel as their kind among those that people are told, and their words."""
    error = envelope.failure
    if error is None or isinstance(error, SystemExit):
        return envelope
    words = str(error) or type(error).__name__
    if isinstance(error, ValueError | OSError):
        return _Envelope(failure=ValueError(words))
    return _Envelope(failure=RuntimeError(f"{type(error).__name__}: {words}"))


def _abroad(error: BaseException | None, where: int, size: int) -> BaseException:
    """What other ranks raise of an exception: rank 0's words need no origin, as it speaks for all."""
    assert error is not None
    if isinstance(error, SystemExit) or where == 0:
        return error
    return type(error)(f"rank {where} of {size}: {error}")


def _marked(error: BaseException) -> BaseException:
    setattr(error, _told, True)
    return error
