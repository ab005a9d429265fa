"""The optimizer's state by parameters' names: a file fits a run that groups otherwise, and files with numbers still load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qat.config import DistillConfig, OptimConfig
from qat.training.gradients.split import LATENT, split
from qat.training.module import QATModule
from qat.training.strategies.optimizer_names import named, numbered

NAMES = {LATENT: ["b.weight", "a.weight"], "vectors": ["a.bias", "b.bias"]}


def stepped(names: dict[str, list[str]], factory: Any) -> tuple[Any, dict[str, nn.Parameter]]:
    """An optimizer after a step, each parameter's gradient a number of its own."""
    order = ["a.weight", "a.bias", "b.weight", "b.bias"]
    parameters = {name: nn.Parameter(torch.ones(2, 2) if "weight" in name else torch.ones(2)) for name in order}
    for place, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full_like(parameter, place + 1.0)
    optimizer = factory([{"name": group, "params": [parameters[name] for name in of]} for group, of in names.items()])
    optimizer.step()
    return optimizer, parameters


def moments(optimizer: Any, parameters: dict[str, nn.Parameter]) -> dict[str, float]:
    parts = getattr(optimizer, "parts", [optimizer])
    kept = {id(p): float(state["exp_avg"].mean()) for part in parts for p, state in part.state.items()}
    return {name: kept[id(parameter)] for name, parameter in parameters.items()}


@pytest.mark.parametrize("factory", [torch.optim.AdamW, split(torch.optim.AdamW, torch.optim.Adam)])
def test_moments_find_their_parameters_in_another_order(factory: Any) -> None:
    optimizer, parameters = stepped(NAMES, factory)
    saved = named(optimizer.state_dict(), NAMES)
    others = {LATENT: ["a.weight", "b.weight"], "vectors": ["b.bias", "a.bias"]}
    new, theirs = stepped(others, factory)
    for parameter in theirs.values():
        parameter.grad = torch.zeros_like(parameter)
    new.step()
    before = moments(optimizer, parameters)
    assert moments(new, theirs) != before
    new.load_state_dict(numbered(saved, others))
    assert moments(new, theirs) == before and len(set(before.values())) == 4


def test_numbers_of_earlier_files_stay() -> None:
    optimizer, _ = stepped(NAMES, torch.optim.AdamW)
    assert numbered(optimizer.state_dict(), NAMES) == optimizer.state_dict()


def test_other_parameters_are_refused() -> None:
    optimizer, _ = stepped(NAMES, torch.optim.AdamW)
    saved = named(optimizer.state_dict(), NAMES)
    with pytest.raises(ValueError, match="the checkpoint's optimizer is of other parameters: a.weight"):
        numbered(saved, {**NAMES, LATENT: ["b.weight"]})


def test_a_rank_that_writes_nothing_has_nothing() -> None:
    assert named({}, NAMES) == {"state": {}, "param_groups": []}


def test_weights_alone_are_saved_without_an_optimizer() -> None:
    module = QATModule(nn.Linear(2, 2), DistillConfig(), OptimConfig(), lambda groups: torch.optim.SGD(groups, lr=1.0), 1)
    checkpoint: dict[str, Any] = {"state_dict": {}}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint == {"state_dict": {}}
