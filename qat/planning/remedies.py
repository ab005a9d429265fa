"""What makes a run fit that does not: settings tried in order, each kept, with the memory that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from qat.planning.memory import FSDP2, Choice, Student, fits, parts

EIGHT_BITS = 2.0 + 2 * 4 / 256
"""Bytes of state a parameter with AdamW's moments in 8 bits: one for each, and a float32 scale for each 256."""
MOST = 4096
"""Devices that are thought of."""


@dataclass(frozen=True)
class Remedy:
    """A setting, and the choice that it makes."""

    setting: str
    choice: Choice
    bytes: int


def remedies(student: Student, choice: Choice, memory: float) -> list[Remedy]:
    """Those that are needed, in order; where the last one does not fit, nothing that is known here would."""
    found: list[Remedy] = []
    for setting, change in _ordered(choice):
        if fits(student, choice, memory):
            break
        changed = change(choice)
        size = sum(parts(student, changed).values())
        if size < sum(parts(student, choice).values()):
            choice = changed
            found.append(Remedy(setting(choice), choice, size))
    return found if fits(student, choice, memory) else [*found, *_more_devices(student, choice, memory)]


def _ordered(choice: Choice) -> Iterator[tuple[Callable[[Choice], str], Callable[[Choice], Choice]]]:
    yield lambda _: "trainer.activation_checkpointing=true", lambda one: replace(one, checkpointing=True)
    if choice.world > 1:
        yield lambda _: "trainer.strategy=fsdp2", lambda one: one if one.scheme.shards else replace(one, scheme=FSDP2)
    yield lambda _: "optim=adamw_8bit", lambda one: one if one.scheme.shards else replace(one, state=min(one.state, EIGHT_BITS))
    yield lambda _: "model.teacher_dtype=bfloat16", lambda one: replace(one, teacher=min(one.teacher, 2.0))
    batch = choice.batch
    while batch > 1:
        batch //= 2
        yield _batch_words, lambda one: replace(one, batch=one.batch // 2, accumulate=one.accumulate * 2)
    yield lambda _: "optim=adamw_offloaded", lambda one: one if one.scheme.shards else replace(one, state=0.0, resting=8.0)


def _batch_words(choice: Choice) -> str:
    return f"data.batch_size={choice.batch} trainer.accumulate_grad_batches={choice.accumulate}"


def _more_devices(student: Student, choice: Choice, memory: float) -> list[Remedy]:
    """The fewest nodes, of as many devices as there are and at least 8, that would do; none where not even many would."""
    each, nodes = max(choice.devices, 8), 1
    while each * nodes <= MOST:
        more = replace(choice, scheme=FSDP2, devices=each, nodes=nodes)
        if more.world > choice.world and fits(student, more, memory):
            words = f"trainer.strategy=fsdp2 trainer.devices={each} trainer.num_nodes={nodes}"
            return [Remedy(words, more, sum(parts(student, more).values()))]
        nodes *= 2
    return []
