"""The dtypes in which a model's weights were stored where it was loaded from: what is not trained is written in them again.

Weights are float32 while they are trained, and a bfloat16 source written as float32 would be twice its size. The record is an
attribute of the model, since it must survive `copy.deepcopy`, conversion and packing, which know nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

_ATTRIBUTE = "_qat_source_dtypes"


def remember(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Note in which dtype each parameter or buffer, by name, was stored."""
    model.__dict__[_ATTRIBUTE] = dict(dtypes)


def source_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """name -> dtype in the source, of every parameter; its own where nobody noted another."""
    noted = model.__dict__.get(_ATTRIBUTE, {})
    return {name: noted.get(name, parameter.dtype) for name, parameter in model.named_parameters(remove_duplicate=False)}
