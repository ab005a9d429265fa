"""AdamW whose moments rest in the memory of the CPU, beside a GPU that has no room for them: 0 bytes a parameter in place of 8.

For a step they come to the GPU one parameter after another, so that it is AdamW's own step there, to the bit; 16 bytes a
parameter travel an update. Rejected: torchao's CPUOffloadOptimizer, which steps on the CPU. It copies each gradient there as soon
as the backward pass has it, before anything is clipped, damped or added in float64, and its checkpoints know no names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class OffloadedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW, with its arguments and its state in checkpoints."""

    shards = False
    """Whether its state can lie in parts."""
    replays = False
    """Whether its step can be captured."""
    rests = True
    """Whether its moments take no memory of the device."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """As AdamW's, a parameter at a time."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            for group, parameter in _each(groups):
                if parameter.grad is not None:
                    self._bring(parameter)
                    self.param_groups = [{**group, "params": [parameter]}]
                    super().step()
                    self._rest(parameter)
        finally:
            self.param_groups = groups
        return loss

    def _bring(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        self._host = {name: state[name] for name in _MOMENTS if name in state}
        state.update({name: host.to(parameter.device, non_blocking=True) for name, host in self._host.items()})

    def _rest(self, parameter: nn.Parameter) -> None:
        """In the memory that they came from."""
        state = self.state[parameter]
        for name in _MOMENTS:
            if name in state:
                host = self._host.get(name)
                state[name] = _resting(state[name]) if host is None else host.copy_(state[name], non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """AdamW's; the moments have arrived."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What AdamW's gave; moments never come to the device all at once, as torch would have them."""
        kept = state_dict["state"]
        rest = {key: {name: one for name, one in state.items() if name not in _MOMENTS} for key, state in kept.items()}
        super().load_state_dict({**state_dict, "state": rest})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, (_, parameter) in zip(numbers, _each(self.param_groups), strict=True):
            moments = {name: one for name, one in kept.get(number, {}).items() if name in _MOMENTS}
            self.state[parameter].update({name: _resting(one, pinned=parameter.is_cuda) for name, one in moments.items()})
            if not self.state[parameter]:
                del self.state[parameter]


def _each(groups: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
    return ((group, parameter) for group in groups for parameter in group["params"])


def _resting(moment: Tensor, pinned: bool | None = None) -> Tensor:
    """A copy of it, in pages that a GPU can read by itself."""
    pinned = moment.is_cuda if pinned is None else pinned
    return torch.empty_like(moment, device="cpu", pin_memory=pinned).copy_(moment, non_blocking=True)
