"""A measurement as a row, how a list of calls becomes one, and how rows are printed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.timing import GRAPH_CALLS, Call, Ceilings, measure


@dataclass
class Row:
    """`share` is the part of the ceiling that the row's own bytes and operations reach; `speedup` is against the baseline."""

    table: str
    shape: str
    tokens: int
    what: str
    microseconds: float | None = None
    mode: str = ""
    share: float | None = None
    speedup: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Peer:
    """What is measured: a maker of calls that touch their own copies of the data, and a call's bytes and operations.

    `late`: torch compiles it first, for seconds.
    """

    make: Callable[[], list[Call]]
    moved: float = 0.0
    operations: float = 0.0
    integer: bool = False
    late: bool = False


@dataclass(frozen=True)
class Bench:
    """The device, its ceilings, the least time a row is measured for, the clock's time from which none is begun, and the rows.

    `late`: beside the baseline the peers that are so, or those that are not; None: all.
    """

    device: torch.device
    ceilings: Ceilings
    seconds: float
    l2_bytes: int
    until: float = float("inf")
    late: bool | None = None
    done: list[Row] = field(default_factory=list)

    def copies(self, bytes_each: float) -> int:
        """So many copies of the data that a round over them is four times the cache, and at most 256."""
        return min(256, int(4 * self.l2_bytes / max(bytes_each, 1)) + 1)

    def row(self, table: str, shape: str, tokens: int, what: str, peer: Peer, in_graph: int = GRAPH_CALLS) -> Row:
        """One peer, measured; one that is not installed or fails is a row that says so."""
        row = Row(table, shape, tokens, what)
        if time.perf_counter() > self.until:
            row.note = "left out: the section's time is over"
            return row
        try:
            timing = measure(peer.make(), self.device, self.seconds, in_graph)
        except ImportError as error:
            row.note = f"not installed: {error.name}"
        except Exception as error:  # a peer's failure is a result
            row.note = f"failed: {str(error).strip().partition(chr(10))[0][:120] or type(error).__name__}"
        else:
            row.microseconds, row.mode, row.note = timing.microseconds, timing.mode, timing.why
            if peer.moved or peer.operations:
                row.share = self.ceilings.floor(peer.moved, peer.operations, peer.integer) / timing.microseconds
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return row

    def table(
        self,
        table: str,
        shape: str,
        tokens: int,
        peers: dict[str, Peer],
        baseline: str,
        in_graph: int = GRAPH_CALLS,
        rate: bool = False,
    ) -> list[Row]:
        """All peers at one shape, the speed of each against the baseline's, printed; `rate` notes tokens a second."""
        torch.compiler.reset()  # else the ninth shape of a function is no longer compiled, and flatters whom it is beside
        chosen = {what: peer for what, peer in peers.items() if self.late in (None, peer.late) or what == baseline}
        rows = [self.row(table, shape, tokens, what, peer, in_graph) for what, peer in chosen.items()]
        base = next((row.microseconds for row in rows if row.what == baseline), None)
        for row in rows:
            if row.microseconds is not None:
                row.speedup = base / row.microseconds if base else None
                row.note = f"{f'{tokens / row.microseconds * 1e6:,.0f} tokens/s ' if rate else ''}{row.note}".strip()
            print(line(row), flush=True)
        self.done.extend(rows)
        return rows


def line(row: Row) -> str:
    """The row for people."""
    start = f"{row.table:12}{row.shape:14}{row.tokens:6} tok  {row.what:38}"
    if row.microseconds is None:
        return start + row.note
    share = f"{row.share:5.0%} of ceiling" if row.share is not None else " " * 16
    speedup = f"{row.speedup:7.2f}x" if row.speedup is not None else ""
    return f"{start}{row.microseconds:11.2f} us  {row.mode:6}{share}{speedup}  {row.note}".rstrip()


def shape_of(n: int, k: int) -> str:
    """As the tables write it."""
    return f"{n}x{k}"


def say(text: str) -> None:
    """A heading, in step with the rows."""
    print(f"\n{text}", flush=True)
