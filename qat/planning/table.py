"""A plan in words: a column for each way to use the devices, and what makes the asked one fit."""

from __future__ import annotations

from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table

from qat.planning.devices import GIB, Device
from qat.planning.memory import ROOM, Choice, Student, host, parts, schemes, whole
from qat.planning.remedies import Remedy, remedies
from qat.planning.speed import speed

WIDTH = 112
"""Columns that the table takes at least, also where it is piped."""


def size(count: float) -> str:
    """`3.2 MiB`, `12.5 GiB`."""
    unit, name = (GIB, "GiB") if count >= GIB else (2**20, "MiB")
    return f"{count / unit:,.1f} {name}" if count >= 2**20 else f"{count:,.0f} bytes"


def span(low: float, high: float) -> str:
    """Two numbers of two digits, or one where they are alike."""
    ends = [f"{float(f'{value:.2g}'):,.10g}" for value in (low, high)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def lines(student: Student, choice: Choice, device: Device, tokens: int) -> list[str]:
    """Of the choice alone, for a dry run."""
    found, fast = parts(student, choice), speed(student, choice, device)
    memory = ", ".join(f"{name} {size(count)}" for name, count in found.items())
    return [
        f"{size(sum(found.values()))} a device: {memory}",
        f"{size(fast.sent)} sent by a device and step, {span(*fast.rates)} tokens a second, {span(*fast.hours(tokens))} hours",
    ]


def rows(student: Student, choice: Choice, device: Device, tokens: int) -> list[tuple[str, ...]]:
    """The table: its head, then a row each."""
    found = [replace(choice, scheme=scheme) for scheme in schemes(choice.world)]
    memory, fast = [parts(student, one) for one in found], [speed(student, one, device) for one in found]
    names = {name: None for one in memory for name in one}
    return [
        ("a device", *(one.scheme.name for one in found)),
        *((name, *(size(one.get(name, 0)) for one in memory)) for name in names),
        (f"in all, of {size(device.memory)}", *(size(sum(one.values())) for one in memory)),
        (f"fits in {ROOM:.0%} of it", *("yes" if sum(one.values()) <= ROOM * device.memory else "no" for one in memory)),
        ("measured whole", *(size(whole(student)) for _ in found)),
        ("CPU memory, a node", *(size(host(student, one)) for one in found)),
        ("sent a step", *(size(one.sent) for one in fast)),
        ("compute, travel, s", *(f"{one.compute:.2g}, {one.travel:.2g}" for one in fast)),
        ("tokens/s, all devices", *(span(*one.rates) for one in fast)),
        ("hours", *(span(*one.hours(tokens)) for one in fast)),
    ]


def advice(student: Student, choice: Choice, device: Device) -> list[str]:
    """How the choice fits, a line for each setting that is needed."""
    found, measured = remedies(student, choice, device.memory), _too_large(student, device)
    if not found:
        return measured
    lines = [f"{choice.scheme.name} does not fit {ROOM:.0%} of {size(device.memory)}; what would, one after another:"]
    lines += [f"  {one.setting}: {size(one.bytes)}" for one in found]
    much = [] if _fits(found[-1], device) else ["  which is still too much: take a larger device or a smaller model"]
    return [*lines, *much, *measured]


def _too_large(student: Student, device: Device) -> list[str]:
    """What no setting changes: a run measures stages on each device with the whole model there."""
    size_there = whole(student)
    if size_there <= ROOM * device.memory:
        return []
    words = f"the {size(size_there)} of whole float32 weights do not fit {ROOM:.0%} of {size(device.memory)}"
    return [f"before and after training a run measures the model on each device: {words}; take a larger device"]


def _fits(last: Remedy, device: Device) -> bool:
    return last.bytes <= ROOM * device.memory


def print_table(student: Student, choice: Choice, device: Device, tokens: int) -> None:
    """The table, what it assumes, and what would fit."""
    console, facts = Console(highlight=False, width=max(WIDTH, Console().width)), student.facts
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    head, *rest = rows(student, choice, device, tokens)
    for name in head:
        table.add_column(name, justify="left" if name == head[0] else "right", no_wrap=True)
    for row in rest:
        table.add_row(*row)
    console.print(
        f"{facts.parameters:,} parameters, {facts.latents:,} of them codes; {choice.world} x {device.name},"
        f" {choice.sequences:,} sequences of {facts.length:,} tokens an update; {tokens:,} tokens",
        soft_wrap=True,
    )
    console.print(table)
    where = "between nodes" if choice.nodes > 1 else "within the node"
    peak = device.flops if choice.mixed else device.flops32
    rate = device.wire if choice.nodes > 1 else device.link
    console.print(
        f"assumed: {device.share:.0%} of {peak / 1e12:g} TFLOP/s, {rate / 1e9:g} GB/s {where}; memory is counted, time is not",
        soft_wrap=True,
    )
    for line in advice(student, choice, device):
        console.print(line, soft_wrap=True, markup=False)
