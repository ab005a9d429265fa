"""The section `optim`: optimizer, learning rates and schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from qat.config.checks import at_least, check_types, choose, fraction

SHARPEST = 1e5
"""Of soft codes: 60 tells them from codes at the border alone, and float16 holds a slope of a quarter of this."""


@dataclass
class OptimConfig:
    """Optimizer, learning rates and schedules."""

    optimizer: dict[str, Any] = field(default_factory=lambda: {"_target_": "torch.optim.AdamW", "betas": [0.9, 0.95]})
    """A `_target_` and its arguments; parameters, lr and weight_decay are passed to it, and `fused: true` if it has that (not
    in 16-mixed): all in one pass, rounded a little otherwise; `+optim.optimizer.fused=false` undoes it."""
    latent_optimizer: dict[str, Any] = field(default_factory=dict)
    """Another one for latent weights alone, in the same form: `{_target_: torch.optim.Muon}`, whose steps then are as long as
    AdamW's (`adjust_lr_fn: match_rms_adamw`, where nothing else is said). Empty: none."""
    lr: float | None = 1e-3
    """Peak learning rate of everything but the latent weights; null: `lr_multiple` times a rate that the model's size says."""
    lr_multiple: float = 6.0
    """Of lr=null: times 5e-4 (N / 10^7)^-0.7, at most 5e-4 and at least 2e-5, a full-precision rate for N parameters."""
    latent_lr_multiplier: float = 1.0
    """Times lr: the peak learning rate of the latent weights of BitLinear layers."""
    weight_decay: float = 0.0
    """On latent weights and other matrices, never on norms, biases and scales."""
    weight_decay_until: float | None = None
    """The share of the run after which weight decay is 0. null: half of it with `schedule=two_stage`, else all of it."""
    schedule: str = "cosine"
    """`cosine`, `linear`, `constant`, or `two_stage` (linear; half way the rate drops by a third, weight decay to 0)."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0."""
    warmup_share: float = 0.0
    """The same as a share of the run's steps, where warmup_steps is 0."""
    final_lr_fraction: float = 0.0
    """The rate at the last step as a share of the peak (cosine and linear)."""
    lambda_steps: int = 0
    """Steps over which quantization is blended in, W + lambda (Q(W) - W) with lambda 0 -> 1; 0: at once."""
    beta2_half_life: float | None = None
    """Tokens after which a squared gradient counts half: beta2 = 0.5^(tokens an update / this); null: the optimizer's own."""
    lambda_schedule: str = "linear"
    """How lambda rises in `lambda_steps`: `linear`, `sigmoid` (slow, fast, slow), or `layerwise` (block after block)."""
    rms_norm_steps: int = 0
    """Steps over which the norms of `quant.rms_norm_start=blended` are blended in, x + b (norm(x) - x) with b 0 -> 1."""
    damping: float = 0.0
    """Weight, at the end of a cosine from 0, of latent weights' squared distance to their levels; as dear as a quantization."""
    freeze_oscillation: float | None = None
    """A code that goes back and forth in more than this share of the looks (.02) is frozen. null: none is."""
    oscillation_every: int = 1
    """Steps between two such looks, each as dear as a quantization; faster swings than a look are not seen."""
    anneal: str = "none"
    """`soft`: weights are their codes' mean under thresholds that sharpen, with its own gradient; `none`: straight through;
    `auto`: soft where the quantizer has a soft form."""
    anneal_from: float = 2.0
    """How sharp soft codes are at first: 2 is nearly a line. It rises by a constant factor a step."""
    anneal_to: float = 60.0
    """How sharp soft codes are at last, before they are codes."""
    anneal_share: float = 0.8
    """The share of the steps that trains with soft codes; the rest trains with codes, as they will be stored."""
    anneal_rest_lr: float = 1.0
    """What the latent weights' rate is multiplied by in that rest. 0 holds the codes, while scales, norms and embeddings settle:
    straight-through steps move weights that came to lie at thresholds over them and back."""

    def __post_init__(self) -> None:
        check_types("optim", self)
        if not isinstance(self.optimizer.get("_target_"), str) or not self.optimizer["_target_"]:
            raise ValueError("optim.optimizer needs a _target_, for example torch.optim.AdamW")
        target = self.latent_optimizer.get("_target_")
        if self.latent_optimizer and (not isinstance(target, str) or not target):
            raise ValueError("optim.latent_optimizer needs a _target_, for example torch.optim.Muon")
        choose("optim.schedule", self.schedule, ("cosine", "linear", "constant", "two_stage"))
        at_least("optim.lr", self.lr, 0, open_end=True, most=1e4)
        at_least("optim.latent_lr_multiplier", self.latent_lr_multiplier, 0, most=1e6)
        at_least("optim.weight_decay", self.weight_decay, 0, most=1e4)
        at_least("optim.weight_decay_until", self.weight_decay_until, 0, most=1)
        at_least("optim.lr_multiple", self.lr_multiple, 0, open_end=True, most=1e6)
        at_least("optim.warmup_steps", self.warmup_steps, 0)
        fraction("optim.warmup_share", self.warmup_share)
        at_least("optim.lambda_steps", self.lambda_steps, 0)
        at_least("optim.beta2_half_life", self.beta2_half_life, 0, open_end=True, most=1e15)
        choose("optim.lambda_schedule", self.lambda_schedule, ("linear", "sigmoid", "layerwise"))
        if self.lambda_schedule != "linear" and not self.lambda_steps:
            raise ValueError(f"optim.lambda_schedule={self.lambda_schedule} needs optim.lambda_steps above 0")
        at_least("optim.rms_norm_steps", self.rms_norm_steps, 0)
        at_least("optim.damping", self.damping, 0, most=1e6)
        at_least("optim.freeze_oscillation", self.freeze_oscillation, 0, open_end=True, most=1)
        at_least("optim.oscillation_every", self.oscillation_every, 1)
        choose("optim.anneal", self.anneal, ("none", "soft", "auto"))
        at_least("optim.anneal_from", self.anneal_from, 0, open_end=True, most=SHARPEST)
        at_least("optim.anneal_to", self.anneal_to, self.anneal_from, most=SHARPEST, why=", which is optim.anneal_from")
        if not 0 < self.anneal_share <= 1:
            raise ValueError(f"optim.anneal_share={self.anneal_share!r} is not allowed; it must be above 0 and at most 1")
        at_least("optim.anneal_rest_lr", self.anneal_rest_lr, 0, most=1e6)
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError(f"optim.final_lr_fraction={self.final_lr_fraction!r} is not allowed; it must be in 0 to 1")

    @property
    def annealed(self) -> bool:
        """Whether codes are soft at first."""
        return self.anneal == "soft"

    @property
    def peak(self) -> float:
        """lr, where it is known.

        Raises:
            ValueError: it is null; a run settles it when the model is loaded.
        """
        if self.lr is None:
            raise ValueError("optim.lr=null is settled by the model's size when a run has loaded it")
        return self.lr

    def hard_from(self, total: int) -> int:
        """The step (0-based) of a run of so many from which it trains with codes."""
        return math.ceil(self.anneal_share * total) if self.annealed else 0

    def held_from(self, total: int) -> int:
        """The step from which latent weights are not trained; `total` where they are to the end."""
        return self.hard_from(total) if self.annealed and not self.anneal_rest_lr else total

    def warmup(self, total: int) -> int:
        """Steps of warm-up in a run of so many."""
        return self.warmup_steps or round(self.warmup_share * total)
