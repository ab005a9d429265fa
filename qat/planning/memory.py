"""Memory of a device, part by part, for each way to use several of them.

Latent weights, gradients and optimizer state are float32 (the state's bytes a parameter are measured on the run's own optimizer).
Under FSDP2 each is a part of 1 / devices; at their widest a pass holds two blocks gathered, the one that computes and the next,
and one block's gradient before it is reduced. Codes for the backward pass are whole on every device, but where they are what is
gathered: then the backward pass gathers them again. Left out: the allocator's fragments and the context of CUDA, about a tenth,
for which `ROOM` leaves space.
"""

from __future__ import annotations

from dataclasses import dataclass

from qat.planning.facts import Facts, Saved

ROOM = 0.9
"""Of a device's memory that a plan fills."""


@dataclass(frozen=True)
class Scheme:
    """A way to use devices: what each of them holds, and what travels."""

    name: str
    strategy: str
    """`trainer.strategy`."""
    several: bool
    """Whether it needs more than one."""
    shards: bool
    """Whether each device has a part of weights, gradients and moments."""
    codes: bool = False
    """Whether latent weights travel as codes of 2 bits."""


ONE = Scheme("one device", "auto", several=False, shards=False)
DDP = Scheme("ddp", "ddp", several=True, shards=False)
FSDP2 = Scheme("fsdp2", "fsdp2", several=True, shards=True)
CODES = Scheme("fsdp2, codes gathered", "fsdp2", several=True, shards=True, codes=True)
SCHEMES = (ONE, DDP, FSDP2, CODES)


@dataclass(frozen=True)
class Choice:
    """A run's settings that memory and time depend on."""

    scheme: Scheme
    devices: int
    nodes: int
    batch: int
    """Sequences on a device at once."""
    accumulate: int = 1
    checkpointing: bool = False
    state: float = 8.0
    """Bytes of optimizer state a parameter."""
    teacher: float = 0.0
    """Bytes of a teacher's parameter; 0: there is none, or it is the student's own copy of codes."""
    mixed: bool = False
    """Whether matmuls are in 16 bits."""
    floats: float = 0.0
    """The share of steps in which layers need more of weights than codes, so that floats are gathered."""
    exact: bool = False
    """Whether gradients are added in float64."""
    resting: float = 0.0
    """Bytes of optimizer state a parameter that rest in the CPU's memory and come here for a step, one matrix at a time."""

    @property
    def world(self) -> int:
        """Devices in all."""
        return self.devices * self.nodes

    @property
    def adds(self) -> bool:
        """Whether float64 sums of gradients are kept, of batches or of what is on the wire."""
        return self.exact and (self.accumulate > 1 or self.world > 1)

    @property
    def sequences(self) -> int:
        """Of an update."""
        return self.world * self.batch * self.accumulate


@dataclass(frozen=True)
class Student:
    """What is trained, and what it learns from."""

    facts: Facts
    teacher: Facts | None = None

    @property
    def flops(self) -> float:
        """Of a token's forward passes, without the recomputed one: student, its backward of twice that, teacher."""
        return 3 * self.facts.flops + (self.teacher.flops if self.teacher else 0.0)


LOGITS = 1
"""Copies of float32 logits that divergence from a teacher keeps for backward beside the student's: measured."""


def parts(student: Student, choice: Choice) -> dict[str, int]:
    """Part -> bytes on the fullest device."""
    facts, teacher = student.facts, student.teacher if choice.teacher else None
    share = choice.world if choice.scheme.shards else 1
    mine, saved = facts.part(share), kept(facts, choice.checkpointing)
    logits = LOGITS * 4 * facts.length * facts.vocabulary if teacher else 0
    found = {
        "weights": 4 * mine,
        "gradients": 4 * mine,
        "sums of gradients": 8 * mine if choice.adds else 0,
        "optimizer": round(choice.state * mine + choice.resting * facts.largest),
        "teacher": round(choice.teacher * teacher.part(share)) if teacher else 0,
        "codes for backward": saved.fixed - _gathered_again(facts, choice, saved.fixed),
        "activations": choice.batch * (saved.sequence + logits),
        "gathered": _gathered(facts, choice) + (_whole(teacher, choice.teacher) if teacher and choice.scheme.shards else 0),
    }
    return {name: size for name, size in found.items() if size}


def kept(facts: Facts, checkpointing: bool) -> Saved:
    """What the forward pass leaves; with activation checkpointing a block's own appears once, while it is computed again."""
    if not checkpointing:
        return facts.saved
    blocks = max(1, len(facts.blocks))
    plain, again = facts.saved, facts.recomputed
    return Saved(again.fixed + plain.fixed // blocks, again.sequence + (plain.sequence - again.sequence) // blocks)


def _gathered(facts: Facts, choice: Choice) -> int:
    """Blocks that are whole at once, and one whole gradient of a block or of the root, whichever is larger; its float64, too."""
    if not choice.scheme.shards:
        return 0
    widest = max((block.count for block in facts.blocks), default=0)
    codes = choice.scheme.codes and not choice.floats
    weights = 2 * max((block.sent for block in facts.blocks), default=0) + facts.root.sent if codes else _whole(facts, 4.0)
    return weights + (12 if choice.exact else 4) * max(widest, facts.root.count)


def _gathered_again(facts: Facts, choice: Choice, fixed: int) -> int:
    """Of the bytes that a forward pass leaves whatever the batch, those that are no copy of what was gathered."""
    if not choice.scheme.codes or choice.floats or not facts.saved.fixed:
        return 0
    codes = sum(one.bytes for module in (facts.root, *facts.blocks) for one in module.coded if not one.floats)
    return min(fixed, round(fixed * codes / facts.saved.fixed))


def _whole(facts: Facts, each: float) -> int:
    """Two blocks and the root, of `each` bytes a parameter."""
    widest = max((block.count for block in facts.blocks), default=0)
    return round(each * (2 * widest + facts.root.count))


def whole(student: Student) -> int:
    """Bytes of the model's float32 weights: before and after training all of them are on each device, to be measured."""
    return 4 * student.facts.parameters


def host(student: Student, choice: Choice) -> int:
    """Bytes of the CPU's memory on the fullest node: what each process has of models, and what rests there of the optimizer.

    Each has the model as it came, its converted copy and the teacher, and in the end a copy to be packed; the first one puts
    together a checkpoint of weights and moments while it trains.
    """
    parameters, taught = student.facts.parameters, student.teacher if choice.teacher else None
    own = taught is not None and (choice.teacher != 4.0 or taught.parameters != parameters)
    each = 8 * parameters + (round(choice.teacher * taught.parameters) if own and taught else 0)
    each += round(choice.resting * parameters)
    gathers = choice.scheme.shards
    checkpoint = round((4 + choice.state) * parameters) if gathers else 0
    return choice.devices * each + max(checkpoint, 4 * parameters * choice.devices)


def schemes(devices: int) -> list[Scheme]:
    """Those that so many devices can have."""
    return [one for one in SCHEMES if one.several == (devices > 1)]


def fits(student: Student, choice: Choice, memory: float) -> bool:
    """Whether it is within what a plan fills of a device's memory."""
    return sum(parts(student, choice).values()) <= ROOM * memory
