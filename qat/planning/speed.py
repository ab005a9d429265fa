"""Bytes on the wire and seconds of a step, from a device's record.

Compute is FLOPs over the share of the peak that trainings reach. What travels may hide behind it or not, so a step takes
between the longer of the two and their sum: both are said. With several nodes, all of a ring waits for the wire between them.
"""

from __future__ import annotations

from dataclasses import dataclass

from qat.parallel.traffic import all_gather, all_reduce, reduce_scatter
from qat.planning.devices import Device
from qat.planning.facts import Facts
from qat.planning.memory import Choice, Student


@dataclass(frozen=True)
class Speed:
    """Of a step."""

    sent: int
    """Bytes that one device sends."""
    compute: float
    """Seconds."""
    travel: float
    """Seconds."""
    tokens: int
    """Of all devices."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Where all that travels hides behind compute, and where nothing does."""
        return max(self.compute, self.travel), self.compute + self.travel

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens a second, the lower first."""
        best, worst = self.seconds
        return self.tokens / worst, self.tokens / best

    def hours(self, tokens: int) -> tuple[float, float]:
        """For so many tokens, the fewer first."""
        worst, best = self.rates
        return tokens / best / 3600, tokens / worst / 3600


def speed(student: Student, choice: Choice, device: Device) -> Speed:
    """Of a step of all devices."""
    mine = choice.batch * choice.accumulate * student.facts.length
    flops = mine * (student.flops + (student.facts.flops if choice.checkpointing else 0.0))
    peak = device.flops if choice.mixed else device.flops32
    sent = bytes_sent(student, choice)
    travel = sent / (device.wire if choice.nodes > 1 else device.link)
    return Speed(sent, flops / (device.share * peak), travel, mine * choice.world)


def bytes_sent(student: Student, choice: Choice) -> int:
    """By one device in a step: with ddp gradients once; with fsdp2 for each batch weights twice, gradients and teacher once.

    ddp adds a number for each parameter, by which it finds those that no rank used. Of codes it is the mean of a run's steps,
    some of which need floats. What validations and looks send is not in it.
    """
    facts, world, each = student.facts, choice.world, 8 if choice.exact else 4
    if world == 1:
        return 0
    if not choice.scheme.shards:
        return all_reduce(each * facts.parameters + 4 * len(_shapes(facts)), world)
    batch = _weights(facts, choice) + reduce_scatter(_shapes(facts), world, 8 * each)
    if student.teacher is not None and choice.teacher:
        batch += all_gather(_shapes(student.teacher), world, 8 * choice.teacher)
    return choice.accumulate * batch


def _weights(facts: Facts, choice: Choice) -> int:
    """Of the student's weights, for a forward and a backward pass."""
    floats = 2 * all_gather(_shapes(facts), choice.world, 32)
    if not choice.scheme.codes:
        return floats
    modules, world = (facts.root, *facts.blocks), choice.world
    coded = [one for module in modules for one in module.coded]
    other = [shape for module in modules for shape in module.other]
    passes = 2 * (all_gather([(one.rows, one.row) for one in coded], world, 8) + all_gather(other, world, 32))
    codes = passes + all_reduce(sum(one.sums for one in coded), world)
    return round(choice.floats * floats + (1 - choice.floats) * codes)


def _shapes(facts: Facts) -> list[tuple[int, int]]:
    return [shape for one in (facts.root, *facts.blocks) for shape in one.latent + one.other]
