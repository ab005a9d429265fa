"""The first sentence of the page: what became of a run, in numbers that a reader would ask for first."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qat.reporting.page.parts import megabytes
from qat.reporting.page.reading import Run

CLOSE, SHORT = 0.1, 0.4
"""ln(trained / full precision): up to the first it is close to full precision, above the second far from it."""


@dataclass(frozen=True)
class Verdict:
    """The sentence, and the tone of the page's head: `good`, `warn`, `bad` or `quiet`."""

    sentence: str
    tone: str


@dataclass(frozen=True)
class Number:
    """One of the few numbers of the page's head."""

    value: str
    label: str
    tone: str = ""


def verdict(run: Run) -> Verdict:
    """What became of the run."""
    status = run.result.status
    if status.startswith("failed"):
        where = f" after step {run.step:,}" if run.step else " before its first step was logged"
        diverged = "Training diverged: the run" if run.divergence else "The run"
        return Verdict(f"{diverged} failed{where}: {status.removeprefix('failed: ')}.", "bad")
    if status.startswith("interrupted"):
        return Verdict(f"The run was {status.partition(';')[0]} and can go on from there.", "warn")
    if not run.done:
        steps = run.get("trainer.max_steps", "?")
        where = f"step {run.step:,} of {f'{steps:,}' if isinstance(steps, int) else steps}"
        if run.killed:
            return Verdict(_killed(run, where), "warn")
        return (
            Verdict(f"The run is at {where}; nothing is decided yet.", "quiet")
            if run.step
            else Verdict(_unfinished(run), "quiet")
        )
    if (trained := run.result.measured.get("trained")) is None:
        return Verdict(f"The run is {status}, and nothing was measured of the trained model.", "warn")
    if not math.isfinite(trained):
        return Verdict("Training diverged: the trained model's outputs are not finite.", "bad")
    stopped = "" if status == "done" else f" The run was {status}."
    return Verdict(" ".join(_sentences(run)) + stopped, tone_of(run))


def _killed(run: Run, where: str) -> str:
    saved = any((run.folder / "checkpoints").glob("*"))
    on = "it can go on from its last checkpoint" if saved else "it has left no checkpoint to go on from"
    return f"The run was killed {f'after {where}' if run.step else 'before its first step was logged'}; {on}."


def _unfinished(run: Run) -> str:
    return "The run has no step yet." if run.result.status == "running" else f"The run has {run.result.status}."


def gap(run: Run) -> float | None:
    """ln(trained / full precision) of perplexities; of labels the share of accuracy that is missing."""
    found = run.result.measured.recovered()
    if "log_ratio_trained" in found:
        return found["log_ratio_trained"]
    return found["points_below_full_precision"] / 100 if "points_below_full_precision" in found else None


def size_factor(run: Run) -> float | None:
    """How many times smaller the packed model is than in bf16."""
    whole, packed = (run.result.bytes.get(key) for key in ("full_precision_bf16", "packed_model"))
    return whole / packed if whole and packed else None


def tone_of(run: Run) -> str:
    """By how far it is from full precision, and whether it diverged."""
    lost = gap(run)
    if run.divergence:
        return "bad"
    return "good" if lost is None or lost <= CLOSE else "warn" if lost <= SHORT else "bad"


def _sentences(run: Run) -> list[str]:
    measured, found = run.result.measured, run.result.measured.recovered()
    trained, full = measured["trained"], measured.get("full_precision")
    said = f"{measured.measure.capitalize()} {measured.shown(trained)} on {measured.text} after training"
    if full is not None:
        said += f", {_distance(run)} full precision's {measured.shown(full)}"
    share = found.get("recovered_share")
    if share is not None and math.isfinite(share):
        said += (
            f"; {share:.1%} of what the conversion cost is recovered"
            if share <= 1
            else "; all that the conversion cost, and more"
        )
    lines, factor = [said + "."], size_factor(run)
    if factor is not None:
        lines.append(
            f"The packed model is {factor:.1f} times smaller than in bf16 ({megabytes(run.result.bytes['packed_model'])})."
        )
    return lines


def _distance(run: Run) -> str:
    lost = gap(run)
    if lost is None:
        return "against"
    if "log_ratio_trained" not in run.result.measured.recovered():
        return f"{abs(100 * lost):.2f} points {'below' if lost >= 0 else 'above'}"
    if lost > math.log(3):
        return f"{math.exp(lost):,.3g} times"
    change = math.expm1(lost)
    return f"{abs(change):.1%} {'above' if change >= 0 else 'below'}"


def numbers(run: Run) -> list[Number]:
    """The head's numbers: those that are known."""
    found, measured = [], run.result.measured
    if (trained := measured.get("trained")) is not None:
        found.append(Number(measured.shown(trained), f"{measured.measure} after training"))
    elif (last := run.last("train/loss")) is not None:
        found.append(Number(f"{last:.4g}", f"loss at step {run.step:,}"))
    if (lost := gap(run)) is not None:
        words = "ln(trained / full precision)" if "log_ratio_trained" in measured.recovered() else "of accuracy lost"
        found.append(Number(f"{lost:+.3f}", words, tone_of(run)))
    if (factor := size_factor(run)) is not None:
        found.append(Number(f"{factor:.1f}×", "smaller than bf16"))
    if run.result.verification:
        found.append(Number("equal", "packed and trained, to the bit", "good"))
    return found
