"""Weights by gradient norm: a constant that is right for one model drowns cross-entropy in another.

BitDistill's constants give the attention relation 221 times cross-entropy's gradient on one reproduction's model. Here each term
is scaled so that its gradient on the latent weights has the norm of cross-entropy's, and a weight in `distill` counts in that.
"""

from __future__ import annotations

REFERENCE = "ce"
LARGEST = 1e6


def factors(norms: dict[str, float]) -> dict[str, float]:
    """Loss -> what its weight is multiplied by, of loss -> its gradient's norm; at most LARGEST, as a term may be without one.

    Empty where cross-entropy has no gradient, or a norm is not finite: there is nothing to go by.
    """
    wanted = norms.get(REFERENCE, 0.0)
    if not all(norm < float("inf") for norm in norms.values()) or wanted == 0:
        return {}
    return {name: wanted / max(norm, wanted / LARGEST) for name, norm in norms.items()}
