"""The sections `eval` and `control`: how perplexity is measured, and the run that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

from qat.config.checks import TOKENS, at_least, check_types


@dataclass
class EvalConfig:
    """How perplexity is measured."""

    context: int | None = None
    """Tokens a window; null: data.sequence_length."""
    stride: int | None = None
    """Tokens by which the window moves; null: the context, so that windows do not overlap."""
    batch_size: int = 8
    """Windows at once."""
    max_tokens: int | None = 65_536
    """Evaluate the first so many tokens; null: all."""
    texts: dict[str, str] = field(default_factory=dict)
    """Further texts, name -> file or `pydoc_data.topics` (English text that ships with Python)."""

    damage: int | None = None
    """Tokens of training text on which a run measures, at its start, what quantizing each layer costs; null: no such map."""

    def __post_init__(self) -> None:
        check_types("eval", self)
        at_least("eval.damage", self.damage, 2, most=TOKENS)
        at_least("eval.context", self.context, 2)
        at_least("eval.stride", self.stride, 1)
        at_least("eval.batch_size", self.batch_size, 1, most=2**20)
        at_least("eval.max_tokens", self.max_tokens, 2, most=TOKENS)
        if self.context and self.stride and self.stride > self.context:
            raise ValueError(f"eval.stride={self.stride} is above eval.context={self.context}, so tokens would be left out")


@dataclass
class ControlConfig:
    """The honest comparison: the full-precision model fine-tuned by cross-entropy on the same tokens, after or before QAT."""

    enabled: bool = False
    """Train it, after the quantized model where `first` is not set."""
    lr: float = 1e-4
    """Its own peak learning rate."""
    first: bool = False
    """Train it before the conversion: the quantized model starts from it, and it is the teacher of model.teacher=shared."""

    def __post_init__(self) -> None:
        check_types("control", self)
        at_least("control.lr", self.lr, 0, open_end=True, most=1e4)
        if self.first and not self.enabled:
            raise ValueError("control.first=true needs control.enabled=true: there is no control that could come first")
