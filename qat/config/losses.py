"""The section `distill`: the loss."""

from __future__ import annotations

from dataclasses import dataclass

from qat.config.checks import at_least, check_types


@dataclass
class DistillConfig:
    """The loss: ce * cross-entropy + kl * tau^2 * KL(teacher || student) (Hinton et al., arXiv:1503.02531, section 2)."""

    ce: float = 1.0
    """Weight of the cross-entropy with the text."""
    kl: float = 0.0
    """Weight of the divergence from the teacher's distribution."""
    temperature: float = 1.0
    """tau of the divergence."""

    def __post_init__(self) -> None:
        check_types("distill", self)
        at_least("distill.ce", self.ce, 0, most=1e6)
        at_least("distill.kl", self.kl, 0, most=1e6)
        at_least("distill.temperature", self.temperature, 1e-4, most=1e4)
        if self.ce == 0 and self.kl == 0:
            raise ValueError("distill.ce=0 and distill.kl=0 leave no loss; set one above 0")
