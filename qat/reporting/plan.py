"""What limits a budget, and the command line that makes the most of it; `python -m qat.plan` prints it.

The statements are measured ones (stories260k, 512 tokens a sequence, one quarter to one percent of a text repeated; the gap is
the difference of log-perplexity to full precision): at 1.6M tokens 390 updates left .42 and 3,120 left .27; at 3,120 updates'
recipe 1.6 tokens a parameter left .38, 6 left .25 and 12, which were eight passes over the text, .23; an AdamW whose beta2 was
.999 at 512 tokens, a half-life of 350,000, beat .99, and that .95. That batches may be small where the half-life is kept, and
that accumulation is of no use: arXiv:2507.07101.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from qat.config import TrainConfig
from qat.reporting import updates
from qat.reporting.estimate import MIB

HALF_LIFE = 350_000
"""In tokens; a quarter of what a short run has."""
WARM_UP = 0.05
TOKENS_A_PARAMETER = 6
PASSES = 4


@dataclass(frozen=True)
class Facts:
    """What is known before a plan."""

    parameters: int
    """That are trained."""
    state_bytes: int
    """Weights, gradients, optimizer and teacher."""
    sequence_bytes: int
    """Activations of one sequence."""
    room_bytes: int
    """Memory of the device."""
    text_tokens: int | None
    """Tokens of one pass over the text; None where the model writes its own."""
    betas: bool
    """Whether the optimizer has betas."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a run, and of what limits it."""

    facts: Facts
    length: int
    """Tokens a sequence."""
    batch: int
    updates: int
    hours: float | None
    """That it takes; None where no step was timed."""
    by_time: bool
    """Whether it was sized by hours."""
    half_life: int
    """Of AdamW's second beta, in tokens."""

    @property
    def tokens_per_update(self) -> int:
        """Whole sequences."""
        return self.batch * self.length

    @property
    def tokens(self) -> int:
        """In all."""
        return self.updates * self.tokens_per_update

    @property
    def beta2(self) -> float:
        """At that half-life."""
        return updates.beta2(self.tokens_per_update, self.half_life)

    @property
    def warmup(self) -> int:
        """Updates."""
        return round(WARM_UP * self.updates)

    @property
    def bytes(self) -> int:
        """Memory of the device that it needs."""
        return self.facts.state_bytes + self.batch * self.facts.sequence_bytes

    @property
    def passes(self) -> float | None:
        """Over the text."""
        return self.tokens / self.facts.text_tokens if self.facts.text_tokens else None


def most_sequences(facts: Facts) -> int:
    """Sequences that fit into nine tenths of the memory at once; 0: not one."""
    return max(0, int(0.9 * facts.room_bytes) - facts.state_bytes) // max(1, facts.sequence_bytes)


def of_tokens(facts: Facts, length: int, tokens: int, rate: float | None = None, by_time: bool = False) -> Plan:
    """The plan for so many tokens; `rate`: tokens a second that were measured.

    Raises:
        ValueError: not one sequence's worth.
    """
    if tokens < length:
        raise ValueError(f"a budget of {tokens:,} tokens is less than one sequence of data.sequence_length={length}")
    batch, count = updates.sized(tokens // length, max(1, most_sequences(facts)))
    hours = None if rate is None else count * batch * length / rate / 3600
    half_life = max(1, min(HALF_LIFE, count * batch * length // 4))
    return Plan(facts, length, batch, count, hours, by_time, half_life)


def limits(plan: Plan) -> list[str]:
    """What limits the budget, the hardest first, each with what would help."""
    found, each = [], plan.tokens / plan.facts.parameters
    if most_sequences(plan.facts) < 1:
        found.append("memory: not one sequence fits; trainer.activation_checkpointing=true, or a shorter data.sequence_length")
    if plan.updates < updates.FEW:
        found.append(f"updates: fewer than {updates.FEW:,}, which leaves a gap of tenths; more tokens, or shorter sequences")
    if each < TOKENS_A_PARAMETER:
        found.append(f"tokens a parameter: {each:.2g}; 1.6 left a gap of .38 and 6 one of .25 where both were measured")
    if plan.passes is not None and plan.passes > PASSES:
        found.append(f"the text: {plan.passes:.1f} passes; twice as many gained .02, so more text (data=mixed) helps more")
    if plan.by_time and not found:
        found.append("time")
    return found or ["nothing that was measured: what more tokens gain is little"]


def of_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(settings, what is assumed beside them) of the command line's words: a model is `model.path=`; without a text it is planned
    as if the model wrote its own, which needs none.

    Raises:
        ValueError: two models.
    """
    models = [word for word in words if "=" not in word and not word.startswith("~")]
    if len(models) > 1:
        raise ValueError(f"{models[0]!r} and {models[1]!r} are no settings; give one model, and settings as key=value")
    given = [word for word in words if word not in models] + [f"model.path={model}" for model in models]
    text = any(word.startswith(("recipe=", "data=", "data.train=")) for word in given)
    return given, [] if text else ["data=selfgen"]


def command_line(plan: Plan, config: TrainConfig, given: Sequence[str], assumed: Sequence[str]) -> str:
    """What starts the run: the settings given, but for those that the plan sets, and the plan's."""
    mine = keys(plan, config)
    names = {setting.partition("=")[0] for setting in mine}
    kept = [setting for setting in given if setting.lstrip("+").partition("=")[0] not in names]
    return shlex.join(["python", "-m", "qat.train", *kept, *(["data.train=FILE"] if assumed else []), *mine])


def keys(plan: Plan, config: TrainConfig) -> list[str]:
    """The settings that make a run of it."""
    found = {"data.batch_size": plan.batch, "trainer.max_steps": plan.updates, "optim.warmup_steps": plan.warmup}
    if config.trainer.accumulate_grad_batches != 1:
        found["trainer.accumulate_grad_batches"] = 1
    if plan.facts.betas:
        found["optim.beta2_half_life"] = plan.half_life
    return [f"{key}={value}" for key, value in found.items()]


def rows(plan: Plan) -> list[tuple[str, str]]:
    """The table, a row each."""
    facts, passes = plan.facts, plan.passes
    text = "the model's own" if passes is None else f"{passes:.2f} passes over {facts.text_tokens:,} tokens"
    share = f"{plan.bytes / MIB:,.0f} of {facts.room_bytes / MIB:,.0f} MiB"
    second = f"{plan.beta2:.5f} (half-life {plan.half_life:,} tokens)" if facts.betas else "the optimizer has none"
    return [
        ("updates", f"{plan.updates:,}"),
        ("tokens an update", f"{plan.tokens_per_update:,} ({plan.batch} x {plan.length})"),
        ("tokens", f"{updates.tokens_in_words(plan.tokens)}, {plan.tokens / facts.parameters:.2g} a parameter"),
        ("text", text),
        ("memory", share),
        ("beta2", second),
        ("warm-up", f"{plan.warmup:,} updates"),
        *([] if plan.hours is None else [("time", f"{plan.hours:.2g} hours on this machine")]),
        ("limited by", "\n".join(limits(plan))),
    ]


def print_plan(plan: Plan, command: str) -> None:
    """The table, and the command line below it, as one line to copy."""
    console = Console(highlight=False)
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in rows(plan):
        table.add_row(name, value)
    console.print(table)
    console.print(command, soft_wrap=True, markup=False)
