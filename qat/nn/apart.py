"""A module that another one uses and does not own: a teacher, a compiled view of the student."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Apart:
    """Holds `module` out of sight of torch, which takes any nn.Module among a module's attributes for a child.

    So it is in no state_dict, gets no gradient by `parameters()`, and does not move, train or evaluate with its user, who does
    that by hand where it is wanted.
    """

    module: nn.Module
