"""Alarms as pure functions, from the series of a run to words: what is wrong, its likely cause, and the key to change.

A rule is asked after each row and each look, and says what holds now; who asks raises what is new and clears what is gone. Limits
are wide: of the recipes that come with the project none raises an alarm. Series of one step are noisy, so medians are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Row = Mapping[str, float]


@dataclass(frozen=True)
class Facts:
    """What does not change in a run."""

    steps: int
    """Of the whole run."""
    settled: int = 0
    """The step from which quantization is blended in whole and the rate has risen."""
    held: float = float("inf")
    """The step from which codes do not change because the configuration says so."""
    lr: float = 1e-3
    usual: float = float("inf")
    """The rate that is right for most models of its size."""
    latent_lr_multiplier: float = 1.0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    passes: float = 1.0
    """Over the training data, of the whole run."""
    act_bits: int | None = 8
    rotated: bool = False
    scale: str = "absmean"
    weights: Callable[[int], Mapping[str, float]] = lambda step: {}
    """Step -> weight of each loss."""

    @property
    def slower(self) -> str:
        """A rate to try where this one is too high."""
        return f"optim.lr={min(self.lr / 3, self.usual):.1g}"


@dataclass(frozen=True)
class History:
    """What a run has shown so far."""

    rows: Sequence[Row]
    """Of metrics.csv, each with its `step`."""
    facts: Facts
    gradients: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    """[S, L], norm of each layer's gradient at the last looks; NaN where there was none to measure."""
    families: Mapping[str, str] = field(default_factory=dict)
    """Layer -> family, in the order of `gradients`."""

    @property
    def step(self) -> int:
        """The last."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    def having(self, name: str) -> list[Row]:
        """The rows that have this metric."""
        return [row for row in self.rows if name in row]

    def settled(self, name: str) -> np.ndarray:
        """The values of a metric since the run has settled."""
        return np.array([row[name] for row in self.having(name) if row["step"] > self.facts.settled])

    def latest(self, name: str) -> dict[str, float]:
        """Family -> the last look's `quant/FAMILY/name`."""
        looks = self.having("quant/flip_rate")
        parts = [(key.split("/"), value) for key, value in (looks[-1] if looks else {}).items()]
        return {key[1]: value for key, value in parts if len(key) == 3 and key[0] == "quant" and key[2] == name}


@dataclass(frozen=True)
class Finding:
    """What an alarm says: see `qat.monitor.alarms.Alarm`."""

    text: str
    key: str
    where: str = ""


FEW, RISE, LOST = 5, 1.0, 50.0
"""Rows of a median; nats by which it may rise; nats that no guess costs, of however many tokens."""
EMPTY, SHRUNK, PEAK, SWINGING, DROWNED = 0.95, -0.9, 64.0, 0.25, 0.98
"""Limits: zero fraction, drift of the scale, peak of inputs over the root mean square of the others, oscillating share, share of
one term."""
STILL = 1e-6
"""A flip rate below it is none."""
PASSES = 16.0


def divergence(h: History) -> Iterator[Finding]:
    """The cross-entropy has risen far above what it had been, or above that of any guess."""
    latest = [row["train/ce"] for row in h.having("train/ce")[-FEW:]]
    if len(latest) == FEW and (now := float(np.median(latest))) > LOST:
        text = f"cross-entropy is {now:.0f}, far above any guess: training diverges, most likely as the learning rate is too high"
        yield Finding(text, h.facts.slower)
        return
    ce = h.settled("train/ce")
    if len(ce) < 2 * FEW:
        return
    medians = np.median(np.lib.stride_tricks.sliding_window_view(ce, FEW), axis=1)
    best, now = float(medians.min()), float(medians[-1])
    if now > best + RISE:
        text = (
            f"cross-entropy is {now:.2f} and had been {best:.2f}: training diverges, most likely as the learning rate is too high"
        )
        yield Finding(text, h.facts.slower)


def no_gradient(h: History) -> Iterator[Finding]:
    """At the last two looks the gradient of a family, or of single layers, was exactly 0."""
    if len(h.gradients) < 2:
        return
    dead = (h.gradients[-2:] == 0).all(0)
    for family in dict.fromkeys(h.families.values()):
        mine = [(name, bool(dead[i])) for i, (name, kind) in enumerate(h.families.items()) if kind == family]
        names = [name for name, is_dead in mine if is_dead]
        if len(names) == len(mine):
            pattern = "*" + names[0].rpartition(".")[2]
            text = f"no gradient reaches the {family} layers: what they compute is cut off from every loss, or frozen"
            yield Finding(text, f"model.exclude=[{pattern}]", family)
            continue
        for name in names:
            text = f"no gradient reaches {name}: what it computes is cut off from every loss, or nothing is sent there"
            yield Finding(text, f"model.exclude=[{name}]", name)


def zero_collapse(h: History) -> Iterator[Finding]:
    """Nearly all codes of a family are 0."""
    key = "optim.weight_decay=0" if h.facts.scale == "absmean" else "quant.scale=absmean"
    for family, share in h.latest("zero_fraction").items():
        if share > EMPTY:
            text = (
                f"{share:.1%} of the codes of {family} are 0: its scale is too large for most of its weights, which have decayed"
            )
            yield Finding(text, key, family)


def codes_frozen(h: History) -> Iterator[Finding]:
    """In the first half of the run a family's codes have stopped changing, for three looks."""
    looks = [row for row in h.having("quant/flip_rate") if h.facts.settled < row["step"] <= h.facts.held]
    for family in h.latest("flip_rate"):
        name, still = f"quant/{family}/flip_rate", 0
        while still < len(looks) and looks[-1 - still].get(name, 1.0) < STILL:
            still += 1
        if still >= 3 and looks[-still]["step"] <= h.facts.steps / 2:
            since = int(looks[-still]["step"])
            text = f"no code of {family} has changed since step {since}: steps are too small to reach a threshold"
            yield Finding(text, f"optim.latent_lr_multiplier={4 * h.facts.latent_lr_multiplier:g}", family)


def oscillation(h: History) -> Iterator[Finding]:
    """Towards the end many codes still swing to and fro."""
    looks = h.having("quant/oscillating")
    if len(looks) >= 4 and looks[-1]["step"] >= 0.9 * h.facts.steps and looks[-1]["quant/oscillating"] > SWINGING:
        share = looks[-1]["quant/oscillating"]
        text = f"{share:.1%} of all codes still swing to and fro, so what is packed is where the last step leaves them"
        yield Finding(text, "optim.freeze_oscillation=0.02")


def scale_collapse(h: History) -> Iterator[Finding]:
    """A family's scale has shrunk to a tenth."""
    key = "optim.weight_decay=0" if h.facts.weight_decay else h.facts.slower
    for family, drift in h.latest("scale_drift").items():
        if drift < SHRUNK:
            text = (
                f"the scale of {family} has shrunk to {1 + drift:.1%} of its start: decay, or too large a rate, eats its weights"
            )
            yield Finding(text, key, family)


def act_outliers(h: History) -> Iterator[Finding]:
    """One input sets the scale of its token, and the others are rounded to a few codes."""
    key = "quant.act_hadamard=true" if not h.facts.rotated else "quant.act_bits=null"
    for family, peak in h.latest("act_peak").items() if h.facts.act_bits else ():
        if peak > PEAK:
            text = (
                f"inputs of {family} peak at {peak:.0f} times the root mean square of the others: outliers leave those few codes"
            )
            yield Finding(text, key, family)


def term_drowns(h: History) -> Iterator[Finding]:
    """At the last two validations one term of the loss had nearly all of the gradient."""
    rows = [row for row in h.rows if sum(key.startswith("optim/grad_norm/") for key in row) > 1][-2:]
    shares = [_shares(row, h.facts) for row in rows]
    for term in shares[-1] if len(shares) == 2 else ():
        if min(share.get(term, 0.0) for share in shares) > DROWNED:
            text = f"{shares[-1][term]:.1%} of the loss's gradient is that of {term}, and drowns the other terms"
            yield Finding(text, "distill.balance=100", term)


def _shares(row: Row, facts: Facts) -> dict[str, float]:
    """Of each term that has a weight: its weighted norm over the sum of all."""
    weights, prefix = facts.weights(int(row["step"]) - 1), "optim/grad_norm/"
    norms = {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
    weighted = {term: weights.get(term, 0.0) * norm for term, norm in norms.items() if weights.get(term, 0.0)}
    total = sum(weighted.values())
    return {term: value / total for term, value in weighted.items()} if total and len(weighted) > 1 else {}


def loss_spikes(h: History) -> Iterator[Finding]:
    """Three of the last 50 rows are far above those before them."""
    ce, around = h.settled("train/ce")[-60:], 10
    spikes = 0
    for i in range(around, len(ce)):
        before = ce[i - around : i]
        middle = float(np.median(before))
        spread = float(np.median(np.abs(before - middle)))
        spikes += ce[i] > 1.5 * middle and ce[i] > middle + 8 * spread
    if spikes >= 3:
        clip = h.facts.clip
        text = f"the loss has spiked {spikes} times lately: single steps go too far, or single sequences are odd"
        yield Finding(text, f"trainer.gradient_clip_val={(clip or 2.0) / 2:g}")


def data_repeated(h: History) -> Iterator[Finding]:
    """The run reads its data so often that it will learn it by heart."""
    if h.facts.passes > PASSES and h.rows:
        text = (
            f"the run reads its data {h.facts.passes:.0f} times: after about 4 passes repeated text teaches less, after 16 hardly"
        )
        fewer = max(1, int(h.facts.steps * PASSES / h.facts.passes))
        yield Finding(text, f"trainer.max_steps={fewer} or data.train with more text")


def plateau(h: History) -> Iterator[Finding]:
    """The loss is flat far above full precision while codes still change: the S-curve's middle.

    In training and on held-out text: the first is also flat, or rises, while codes that are soft in training harden, and its rows
    differ by their batches more than by what a healthy run learns between them.
    """
    held_out, looks, steps = h.having("val/gap"), h.having("quant/flip_rate"), h.facts.steps
    inside = 0.15 * steps + h.facts.settled <= h.step <= 0.7 * steps
    if not inside or not looks or not held_out or held_out[-1]["val/gap"] < 0.3:
        return
    before = [row["val/ce"] for row in held_out if row["step"] <= held_out[-1]["step"] - 0.1 * steps]
    settled = [row for row in h.having("train/ce") if row["step"] > h.facts.settled]
    late_rows = sum(row["step"] > h.step - 0.15 * steps for row in settled)
    window = [row["train/ce"] for row in settled[-max(late_rows, 2 * FEW) :]]  # a run of few rows: a longer part of it
    third = max(len(window) // 3, FEW)
    if len(window) < 2 * FEW or not before or not _flat(before[-1], held_out[-1]["val/ce"]):
        return
    early, late = float(np.median(window[:third])), float(np.median(window[-third:]))
    if _flat(early, late) and looks[-1]["quant/flip_rate"] > 1e-4:
        flips = looks[-1]["quant/flip_rate"]
        text = f"the loss is flat at {late:.2f}, but {flips:.2%} of the codes still change: it falls in an S, so wait"
        yield Finding(text, "")


def _flat(early: float, late: float) -> bool:
    return abs(early - late) < 0.005 * early


def teacher_mismatch(h: History) -> Iterator[Finding]:
    """The teacher knows the text less than its student, or far less than the model in full precision."""
    rows = h.having("val/teacher_ce")
    if not rows:
        return
    row, teacher = rows[-1], rows[-1]["val/teacher_ce"]
    known = f"the teacher's cross-entropy on held-out text is {teacher:.2f}"
    full = row.get("val/full_precision_ce", teacher)
    if teacher > row["val/ce"] + 0.1:
        yield Finding(f"{known}, its student's {row['val/ce']:.2f}: it teaches what is wrong", "distill=none")
    elif teacher > full + RISE:
        yield Finding(f"{known}, full precision's {full:.2f}: it does not know this text", "model.teacher=shared")


RULES: dict[str, Callable[[History], Iterator[Finding]]] = {
    rule.__name__: rule
    for rule in (
        divergence,
        no_gradient,
        zero_collapse,
        codes_frozen,
        oscillation,
        scale_collapse,
        act_outliers,
        term_drowns,
        loss_spikes,
        data_repeated,
        plateau,
        teacher_mismatch,
    )
}
"""Kind of alarm -> its rule."""
LASTING = ("divergence", "loss_spikes", "data_repeated", "teacher_mismatch")
"""What is said of a run that diverges: other rules would name what follows from it, and hide the cause."""


def findings(history: History) -> dict[tuple[str, str], Finding]:
    """(kind, where) -> what holds now."""
    return {(kind, found.where): found for kind, rule in RULES.items() for found in rule(history)}
