"""How things are timed, and this machine's ceilings.

On a GPU the calls are captured into a CUDA graph and its replays are timed with events, so that nothing but the device's
work is in the number; a call that cannot be captured is timed in a plain loop and marked `eager`. On a CPU, where only the
tests of this benchmark run, a clock does. Every number is a median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
GRAPH_CALLS = 20  # least number of calls in a graph, so that the launch of the graph itself does not count


@dataclass(frozen=True)
class Timing:
    """Median microseconds of a call, how it ran: `graph`, `eager` or `clock`; and why it was not captured, where it should be."""

    microseconds: float
    mode: str
    why: str = ""


def measure(calls: Sequence[Call], device: torch.device, seconds: float, in_graph: int = GRAPH_CALLS) -> Timing:
    """Median time of one of the calls, which take turns: many of them with their own data outrun a cache.

    A graph holds `in_graph` calls or more; with 0, all run in a plain loop.
    """
    if device.type != "cuda":
        return Timing(_clock(calls, seconds), "clock")
    for call in calls:  # compiles, loads and allocates
        call(), call()
    torch.cuda.synchronize(device)
    why = ""
    if in_graph:
        try:
            return Timing(_replays(calls, seconds, in_graph), "graph")
        except RuntimeError as error:  # what waits for the device or asks for memory of its own cannot be captured
            torch.cuda.synchronize(device)
            why = f"not captured: {str(error).strip().partition(chr(10))[0][:80]}"
    return Timing(_loop(calls, seconds), "eager", why)


def _clock(calls: Sequence[Call], seconds: float) -> float:
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        start = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - start) / len(calls))
    return statistics.median(times) * 1e6


def _replays(calls: Sequence[Call], seconds: float, in_graph: int) -> float:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    rounds = -(-in_graph // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return _median(graph.replay, seconds, 1) / (rounds * len(calls))


def _loop(calls: Sequence[Call], seconds: float) -> float:
    def every() -> None:
        for call in calls:
            call()

    return _median(every, seconds, 2) / len(calls)


def _median(call: Call, seconds: float, untimed: int) -> float:
    """Microseconds between events around a call, in batches that are enqueued before the device is waited for."""
    for _ in range(untimed):
        call()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 10 or time.perf_counter() < stop:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(5)]
        for begin, end in events:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        times += [begin.elapsed_time(end) for begin, end in events]
    return statistics.median(times) * 1e3


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches, measured: bytes read plus written a second, and operations a second (0: not supported)."""

    bytes_per_second: float
    bf16: float
    int8: float

    @classmethod
    def measure(cls, device: torch.device, seconds: float, copy_bytes: int = 2 << 30, width: int = 8192) -> Ceilings:
        """A copy of so many bytes, and products of random square matrices of so many columns."""
        source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = measure([lambda: target.copy_(source)], device, seconds).microseconds
        a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
        bf16 = measure([lambda: a @ b], device, seconds).microseconds
        c, d = (torch.randint(-127, 128, (width, width), device=device, dtype=torch.int8) for _ in range(2))
        try:
            int8 = 2e6 * width**3 / measure([lambda: torch._int_mm(c, d.t())], device, seconds).microseconds
        except RuntimeError:
            int8 = 0.0
        return cls(2e6 * copy_bytes / copy, 2e6 * width**3 / bf16, int8)

    def floor(self, moved: float, operations: float, integer: bool) -> float:
        """The least microseconds for so many bytes and operations: the larger of the two times."""
        rate = self.int8 if integer and self.int8 else self.bf16
        return 1e6 * max(moved / self.bytes_per_second, operations / rate)

    def line(self) -> str:
        """For people."""
        return (
            f"copy {self.bytes_per_second / 1e12:.2f} TB/s (read + written), bf16 {self.bf16 / 1e12:.0f} TFLOP/s,"
            f" int8 {self.int8 / 1e12:.0f} TOP/s ({self.int8 / self.bf16:.1f} : 1)"
        )
