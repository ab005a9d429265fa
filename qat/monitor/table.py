"""The one table of metrics: what a training logs, by name, with its unit and what it says. Every sink, page and panel reads it.

The first part of a name is its section, by which trackers group. A key may be a pattern: `{family}` stands for one part of a
name, and a placeholder that ends in dots, `{what...}`, for one or several. A name that is a key itself is never a pattern's.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

SECTIONS = MappingProxyType(
    {
        "train": "Training",
        "val": "Validation",
        "optim": "Optimization",
        "quant": "Quantization health",
        "speed": "Speed",
        "result": "Results",
    }
)
"""Section -> its title. The axes, `step` and `tokens`, are in none."""


@dataclass(frozen=True)
class Metric:
    """What a number is."""

    unit: str
    """`nats`, `share` (0 to 1), `bytes`, ...; '' for a plain number."""
    better: str
    """`up`, `down` or `none`."""
    section: str
    """Of `SECTIONS`; '' for an axis."""
    says: str
    """One sentence."""


def _row(section: str, unit: str, better: str, says: str) -> Metric:
    return Metric(unit, better, section, says)


_AXES = {
    "step": _row("", "steps", "none", "Optimizer steps done; 1 is the first."),
    "tokens": _row("", "tokens", "none", "Tokens of training read so far, padding included, resumed parts too."),
}
_TRAIN = {
    "train/loss": _row(
        "train", "", "down", "Weighted sum of the losses; this and its terms are means over the tokens since the last row."
    ),
    "train/ce": _row("train", "nats", "down", "Cross-entropy with the text or the labels, a mean over the predicted tokens."),
    "train/kl": _row("train", "nats", "down", "KL divergence from the teacher's distribution."),
    "train/epoch": _row("train", "passes", "none", "Passes over the training sequences so far."),
    "train/weight/{term}": _row("train", "", "none", "Weight of this term of the loss, as balancing has set it."),
    "train/{term}": _row("train", "", "down", "This term of the loss, unweighted."),
}
_VAL = {
    "val/loss": _row("val", "", "down", "Weighted sum of the losses on held-out text."),
    "val/ce": _row("val", "nats", "down", "Cross-entropy on held-out text."),
    "val/kl": _row("val", "nats", "down", "KL divergence from the teacher on held-out text."),
    "val/perplexity": _row("val", "", "down", "exp(cross-entropy) on held-out text."),
    "val/gap": _row(
        "val", "nats", "down", "Cross-entropy minus that of full precision on the same text: what is not recovered yet."
    ),
    "val/full_precision_ce": _row("val", "nats", "none", "Cross-entropy of full precision on the text of the validations."),
    "val/teacher_ce": _row("val", "nats", "none", "Cross-entropy of the teacher on the text of the validations."),
    "val/agreement": _row("val", "share", "up", "Held-out tokens for which student and teacher find the same one the likeliest."),
    "val/accuracy": _row("val", "share", "up", "Held-out examples whose label is right."),
    "val/f1": _row("val", "share", "up", "Mean over labels of their F1 on held-out examples."),
    "val/{term}": _row("val", "", "down", "This term of the loss on held-out text, unweighted."),
}
_OPTIM = {
    "optim/lr/{group}": _row("optim", "", "none", "Learning rate of this group of parameters in this step."),
    "optim/weight_decay": _row("optim", "", "none", "Weight decay of latent weights in this step."),
    "optim/lambda": _row("optim", "share", "none", "How much of quantization is blended in; the least of all layers."),
    "optim/beta": _row("optim", "", "none", "Sharpness of soft codes; absent while codes are codes."),
    "optim/grad_norm": _row("optim", "", "none", "Norm of all gradients of this step, before clipping."),
    "optim/grad_norm_latents": _row("optim", "", "none", "Norm of the latent weights' gradients, before clipping."),
    "optim/clipped_share": _row("optim", "share", "down", "Steps since the last row whose gradients were clipped."),
    "optim/update_ratio": _row(
        "optim", "", "none", "Norm of a step's change of the latent weights over their norm, on a sample."
    ),
    "optim/grad_norm/{term}": _row("optim", "", "none", "Norm of this loss term's gradient on the latent weights."),
}
HEALTH = {
    "flip_rate": ("share", "none", "Codes that changed since the last look."),
    "sign_flips": ("share", "none", "Codes that are the negative of what they were at the start."),
    "mask_changes": ("share", "none", "Codes that were 0 at the start or are now, but not both."),
    "oscillating": ("share", "down", "Codes that changed at 2 or more of the last 4 looks."),
    "zero_fraction": ("share", "none", "Codes that are 0."),
    "dead_zone": ("share", "none", "Latent weights within a twentieth of a scale of a threshold between two codes."),
    "scale": ("", "none", "Mean scale of the codes."),
    "scale_drift": ("share", "none", "Mean scale over that at the start, minus 1."),
    "error": ("share", "down", "Norm of latent minus quantized weights over the norm of the latent ones."),
    "act_absmax": ("", "none", "Largest magnitude of the inputs that are quantized."),
    "act_peak": (
        "",
        "down",
        "Largest magnitude of a token's inputs over the root mean square of its others, a mean over tokens.",
    ),
    "act_outliers": ("share", "down", "Inputs above 6 times the root mean square of their token."),
    "act_clipped": ("share", "down", "Inputs at the outermost code; absmax scales put at least one of each token there."),
}
"""Name -> unit, better, sentence: what is measured of every layer, and of a family and the whole model by sums over counts.

The largest magnitude of several layers is the largest of theirs.
"""
LAYER_ONLY = {
    "grad_norm": ("", "none", "Norm of the latent weight's gradient at the look's step, before clipping."),
}
"""What is in the file of layers alone, likewise."""
_QUANT = {
    **{f"quant/{name}": _row("quant", *said) for name, said in HEALTH.items()},
    **{
        f"quant/{{family}}/{name}": _row("quant", unit, better, f"{says[:-1]}, of this family of layers.")
        for name, (unit, better, says) in HEALTH.items()
    },
}
_SPEED = {
    "speed/tokens_per_second": _row("speed", "tokens/s", "up", "Tokens a second since the last row, without validations."),
    "speed/data": _row("speed", "s", "down", "Seconds of a step that wait for batches, a mean since the last row."),
    "speed/forward": _row("speed", "s", "down", "Seconds of a step in the forward pass, the teacher's included."),
    "speed/backward": _row("speed", "s", "down", "Seconds of a step in the backward pass."),
    "speed/optimizer": _row("speed", "s", "down", "Seconds of a step in clipping and stepping."),
    "speed/memory": _row("speed", "bytes", "down", "Memory: most allocated on the GPU so far, or resident now on a CPU."),
    "speed/mfu": _row(
        "speed", "share", "up", "6 x parameters x tokens a second, over the device's peak; absent where it is not known."
    ),
}
_RESULT = {
    "result/perplexity/{stage}": _row("result", "", "down", "Perplexity of the evaluation text at this stage of the run."),
    "result/accuracy/{stage}": _row("result", "share", "up", "Accuracy on the run's examples at this stage."),
    "result/recovered_share": _row("result", "share", "up", "Share of what conversion lost that training recovered."),
    "result/log_ratio_trained": _row("result", "nats", "down", "ln(trained / full precision) of the perplexities."),
    "result/points_below_full_precision": _row("result", "points", "down", "Points of accuracy below full precision."),
    "result/tokens": _row("result", "tokens", "none", "Tokens trained on, resumed parts included."),
    "result/seconds": _row("result", "s", "down", "Seconds of training, without validations."),
    "result/seconds_total": _row("result", "s", "down", "Seconds of the whole run."),
    "result/tokens_per_second": _row("result", "tokens/s", "up", "Tokens a second over all of the training."),
    "result/bytes/{what}": _row("result", "bytes", "down", "Bytes of this part or file."),
    "result/{what...}": _row("result", "", "none", "This number of result.json, by its keys."),
}
METRICS: dict[str, Metric] = {**_AXES, **_TRAIN, **_VAL, **_OPTIM, **_QUANT, **_SPEED, **_RESULT}
"""Name or pattern -> what it is, the more particular pattern first."""


def find(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ValueError: there is none; the message names the nearest ones.
    """
    if name in METRICS and "{" not in name:
        return METRICS[name]
    for pattern in METRICS:
        if "{" in pattern and _regex(pattern).fullmatch(name):
            return METRICS[pattern]
    near = ", ".join(difflib.get_close_matches(name, METRICS, 3, 0.4)) or "those of qat.monitor.table"
    raise ValueError(f"{name!r} is no metric; there are {near}")


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+(?:\.\.\.)?\})", pattern)
    return re.compile(
        "".join((".+" if part.endswith("...}") else "[^/]+") if part[:1] == "{" else re.escape(part) for part in parts)
    )


def result_metrics(values: dict[str, object], prefix: str = "result") -> dict[str, float]:
    """Every number of result.json by its keys: {"bytes": {"packed_model": 9}} gives `result/bytes/packed_model`."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= result_metrics(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}/{key}"] = float(value)
    return found
