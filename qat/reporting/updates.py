"""How often a run changes its weights, in words: an update is an optimizer step.

Measured on stories260k (1.6M tokens of 512 a sequence, everything else equal): 390 updates of 8 sequences left a gap to full
precision of .42 nats, 3,120 of one sequence .27; a batch of one is stable where AdamW's second moment keeps its half-life in
tokens (arXiv:2507.07101, which finds no use in gradient accumulation either).
"""

from __future__ import annotations

from qat.config import TrainConfig, TrainerConfig
from qat.tasks import TASKS

FEW = 1000
"""Updates below which their number limits what is recovered."""
ENOUGH = 3000
"""Updates that a fine-tuning is sized for."""


def tokens_per_update(config: TrainConfig) -> int:
    """Tokens of an optimizer step on all devices; of chats with their padding."""
    return sequences_per_update(config) * config.data.sequence_length


def sequences_per_update(config: TrainConfig) -> int:
    """Sequences of an optimizer step on all devices."""
    trainer = config.trainer
    return trainer.accumulate_grad_batches * config.data.batch_size * trainer.devices * trainer.num_nodes


def beta2(tokens: int, half_life: float) -> float:
    """AdamW's beta2 for updates of so many tokens: 0.5^(tokens / half_life) (arXiv:2507.07101, section 3)."""
    return float(0.5 ** (tokens / half_life))


def sized(sequences: int, most: int | None = None) -> tuple[int, int]:
    """(sequences an update, updates) for so many sequences in all: at least 3,000 updates where there are as many.

    `most`: sequences that fit into memory at once.
    """
    batch = max(1, min(sequences // ENOUGH, most or sequences))
    return batch, max(1, sequences // batch)


def tokens_in_words(count: int) -> str:
    """`1,536 tokens`, `1.6 million tokens`, `2.1 billion tokens`."""
    for size, name in ((10**9, " billion"), (10**6, " million")):
        if count >= size:
            return f"{count / size:.1f}{name} tokens"
    return f"{count:,} tokens"


def in_words(config: TrainConfig) -> str:
    """`3,120 updates of 512 tokens, 1.6 million tokens`."""
    updates, each = config.trainer.max_steps, tokens_per_update(config)
    most = "" if TASKS[config.task].whole else "at most "
    return f"{updates:,} updates of {most}{each:,} tokens, {most}{tokens_in_words(updates * each)}"


def lines(config: TrainConfig) -> list[str]:
    """All that is said of them where a run begins."""
    return [in_words(config), *(f"warning: {said}" for said in warnings(config)), *order(config.trainer)]


def warnings(config: TrainConfig) -> list[str]:
    """What is to be said of few updates and of a warm-up that outlasts them."""
    return [said for said in (warning(config), outlasted(config)) if said]


def outlasted(config: TrainConfig) -> str | None:
    """What is to be said of a warm-up that the run does not outlive: the rate never comes down, or never reaches its peak."""
    updates, warmup = config.trainer.max_steps, config.optim.warmup(config.trainer.max_steps)
    if warmup < updates:
        return None
    return f"a warm-up of {warmup:,} of {updates:,} updates: the rate never falls; optim.warmup_steps={updates // 20} fits"


def order(trainer: TrainerConfig) -> list[str]:
    """In which order the gradients of an update are added, where several devices add more than two batches and it matters.

    fsdp2 sums a batch's over devices at once, so that they stay in parts; ddp waits for its last batch, which sends less.
    """
    batches, devices = trainer.accumulate_grad_batches, trainer.devices * trainer.num_nodes
    if devices == 1 or batches * devices == 2 or trainer.gradient_sums == "float64":
        return []
    if batches == 1:
        how = f"over {devices} devices"
    elif trainer.strategy == "fsdp2":
        how = f"those of a batch over {devices} devices, then {batches} batches'"
    else:
        how = f"{batches} batches' on each of {devices} devices, then over devices"
    turn = f"one process adds {batches * devices} in turn: equal up to rounding, not to the bit"
    return [f"gradients are added {how}; {turn}, but with trainer.gradient_sums=float64"]


def warning(config: TrainConfig) -> str | None:
    """What is to be said of fewer than 1,000 updates, with the keys that make more; None where there are enough."""
    updates = config.trainer.max_steps
    if updates >= FEW:
        return None
    batch, more = sized(updates * config.trainer.accumulate_grad_batches * config.data.batch_size)  # of one device
    keys = f"data.batch_size={batch} trainer.max_steps={more}" + (
        " trainer.accumulate_grad_batches=1" if config.trainer.accumulate_grad_batches > 1 else ""
    )
    if more > updates:
        advice = f"{keys} makes {more:,} of the same tokens"
        further = "" if more >= FEW else ", and more tokens make more"
    else:
        advice, further = (
            f"at a batch of one sequence they are as many as these tokens allow; trainer.max_steps={FEW} or more",
            "",
        )
    return f"{updates:,} updates; below {FEW:,} the gap to full precision is limited by updates: {advice}{further}"
