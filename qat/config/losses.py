"""The section `distill`: the loss."""

from __future__ import annotations

from dataclasses import dataclass

from qat.config.checks import at_least, check_types, fraction


@dataclass
class DistillConfig:
    """The loss: ce * cross-entropy + kl * tau^2 * KL(teacher || student) (Hinton et al., arXiv:1503.02531, section 2), and terms
    on the residual stream after each layer, before the final norm: hidden * |h_S - h_T|^2 / |h_T|^2 + cosine * (1 - cos)."""

    ce: float = 1.0
    """Weight of the cross-entropy with the text."""
    kl: float = 0.0
    """Weight of the divergence from the teacher's distribution."""
    temperature: float = 1.0
    """tau of the divergence."""
    kl_from: float | None = None
    """Share of the run from which kl has its weight, as where the learning rate has fallen; null: from the first step."""
    kl_until: float | None = None
    """Share of the run at which kl's weight has fallen in a line to 0; null: it stays."""
    kl_chunk: int | None = None
    """Tokens whose cross-entropy and divergence are computed at a time, and again in the backward pass; null: all at once."""
    hidden: float = 0.0
    """Weight of the distance of student's and teacher's residual streams as a share of the teacher's, a mean over layers."""
    hidden_until: float | None = None
    """Share of the run at which hidden's weight has fallen in a line to 0; null: it stays."""
    cosine: float = 0.0
    """Weight of 1 - cosine of student's and teacher's residual streams, a mean over layers."""
    relation: float = 0.0
    """Weight of the divergence of attention relations among queries, among keys and among values (arXiv:2012.15828, 3.1)."""
    relation_layer: int = -1
    """The layer whose relations are compared; -1 is the last."""
    relation_heads: int | None = None
    """Relation heads that queries, keys and values are each cut into; null: the model's attention heads."""
    balance: int | None = None
    """Every so many steps, scale each term so that its gradient norm on the latent weights is cross-entropy's; null: never."""

    def __post_init__(self) -> None:
        check_types("distill", self)
        at_least("distill.ce", self.ce, 0, most=1e6)
        at_least("distill.kl", self.kl, 0, most=1e6)
        at_least("distill.temperature", self.temperature, 1e-4, most=1e4)
        for key in ("hidden", "cosine", "relation"):
            at_least(f"distill.{key}", getattr(self, key), 0, most=1e6)
        for key in ("kl_chunk", "relation_heads", "balance"):
            at_least(f"distill.{key}", getattr(self, key), 1)
        for key in ("kl_until", "hidden_until"):
            at_least(f"distill.{key}", getattr(self, key), 0, most=1, open_end=True)
        if self.kl_from is not None:
            fraction("distill.kl_from", self.kl_from)
        if self.kl_from is not None and self.kl_until is not None and self.kl_from >= self.kl_until:
            raise ValueError(
                f"distill.kl_from={self.kl_from} is not below distill.kl_until={self.kl_until}, so kl would never count"
            )
        self._check_some_loss()

    def _check_some_loss(self) -> None:
        """Cross-entropy and divergence alone teach the output head."""
        if self.ce == 0 and self.kl == 0:
            raise ValueError("distill.ce=0 and distill.kl=0 leave no loss; set one above 0")
        if self.balance is not None and not any((self.kl, self.hidden, self.cosine, self.relation)):
            raise ValueError(
                f"distill.balance={self.balance} balances terms with cross-entropy, and there are none but it; set one above 0"
            )
        if self.ce == 0 and (self.kl_from or (self.kl_until or 1) < 1):
            keys = f"distill.kl_from={self.kl_from}, distill.kl_until={self.kl_until}"
            raise ValueError(f"distill.ce=0 with {keys} leaves steps without a loss; set distill.ce above 0")
