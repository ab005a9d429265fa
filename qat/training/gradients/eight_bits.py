"""AdamW whose moments take 8 bits each (arXiv:2110.02861, by torchao): 2 bytes a parameter in place of 8.

torchao's class does the arithmetic. Added here: a learning rate may be set as a number, as schedules do; what goes into a
checkpoint is plain tensors, which read without torchao; on a CPU it runs as it is, as compiling a step for each shape takes
longer than a small run. Moments are rounded in blocks of 256, which do not end where shards do: so it does not go with fsdp2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

_NOTES = {"torchao": "Failed to load ", "torch.utils._pytree": "register_constant() on Enum subclasses"}
"""Logger -> what it says while torchao is imported: of kernels for matrix products, and of torch's own future."""


@contextmanager
def _without_notes() -> Iterator[None]:
    found = {logging.getLogger(name): _other_than(words) for name, words in _NOTES.items()}
    for logger, keep in found.items():
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger, keep in found.items():
            logger.removeFilter(keep)


def _other_than(words: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: words not in record.getMessage()


try:
    with _without_notes():
        from torchao.optim import AdamW8bit as _AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit
except ImportError as error:
    raise ImportError("AdamW8bit needs torchao: pip install qat-bitlinear[torchao]") from error

_PARTS = ("codes", "scale", "qmap", "signed")


class AdamW8bit(_AdamW8bit):  # type: ignore[misc]
    """Moments of weights with at least 4,096 elements, in a multiple of 256, are in 8 bits; all others in float32."""

    shards = False
    """Whether its state can lie in parts."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """With its learning rate as a number, which schedules and logs read, where torchao has a tensor."""
        super().add_param_group(param_group)
        self.param_groups[-1]["lr"] = float(self.param_groups[-1]["lr"])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As torchao's, at the learning rates that the groups have now; those are numbers while the closure runs."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rates = [float(group["lr"]) for group in self.param_groups]
        devices = {parameter.device.type for group in self.param_groups for parameter in group["params"]}
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = torch.tensor(rate, dtype=torch.float32)
        try:
            with torch.compiler.set_stance("force_eager") if devices == {"cpu"} else nullcontext():
                super().step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Each moment in 8 bits as its parts, by name."""
        found = super().state_dict()
        moments = {key: {name: _plain(one) for name, one in state.items()} for key, state in found["state"].items()}
        return {**found, "state": moments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        moments = state_dict["state"]
        whole = {key: {name: _moment(one) for name, one in state.items()} for key, state in moments.items()}
        super().load_state_dict({**state_dict, "state": whole})


def _plain(value: Any) -> Any:
    return {part: getattr(value, part) for part in _PARTS} if isinstance(value, OptimState8bit) else value


def _moment(value: Any) -> Any:
    return OptimState8bit(*(value[part] for part in _PARTS), dtype=torch.float32) if isinstance(value, dict) else value
