"""The step that is captured, and replayed while nothing of it has changed but what lies in buffers.

In buffers lie the batch, the learning rates, whether a loss was not finite, and, in layers, the sharpness of soft codes and
lambda. All else is part of the graph: shapes, weights of losses, weight decay, betas, which layers are soft. Where that changes,
and after a validation, which takes soft codes away and gives them anew, the step is captured once more. Steps that write a row or
look at gradients are not replayed but run as ever, with the same weights and moments, so that callbacks see what they always see.

Rates in buffers are float32, which is all that fused steps read from there, so a schedule's last bits may differ from those of a
run without a graph. Before a capture the step's forward and backward run on the capture's own stream, as torch asks for, with the
random numbers set back, so that a run that captures at other steps draws the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qat.training.gradients.split import parts_of

Batch = dict[str, Any]
Outputs = dict[str, Tensor]
Capture = Callable[[Callable[[], Outputs], Callable[[], Any], torch.device], tuple[Callable[[], None], Outputs]]
"""(the step, its forward and backward alone, device) -> (replay, the outputs that each replay writes)."""
_WARM_UP = 3


def cuda_graph(
    step: Callable[[], Outputs], passes: Callable[[], Any], device: torch.device
) -> tuple[Callable[[], None], Outputs]:
    """`Capture` by torch.cuda.graph."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.random.fork_rng([device]), torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            passes()
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph):
        outputs = step()
    return graph.replay, outputs


class WholeStep:
    """Replays of one step on the device.

    Args:
        forward: a batch -> (the loss, outputs to keep), all on the device.
        clip: clips the gradients; their norm, or None.
        optimizer: what steps.
        frozen: what of the step lies in no buffer, beside the batch's shapes and the optimizer's settings.
        capture: how a step is captured; tests put one in its place that computes the step again.
    """

    def __init__(
        self,
        forward: Callable[[Batch], tuple[Tensor, Outputs]],
        clip: Callable[[], Tensor | None],
        optimizer: torch.optim.Optimizer,
        frozen: Callable[[], Any],
        capture: Capture = cuda_graph,
    ) -> None:
        self.forward, self.clip, self.optimizer, self.frozen, self.capture = forward, clip, optimizer, frozen, capture
        self.captures = 0
        self._key: Any = None
        self._buffers: Batch = {}
        self._rates: list[Tensor] = []
        self._bad: Tensor | None = None

    def __call__(self, batch: Batch) -> Outputs:
        """One step on a batch: `loss`, `norm` where gradients are clipped, and what `forward` keeps; copies, for the caller."""
        key = self._frozen(batch)
        if key != self._key:
            self._capture(batch, key)
        for name, value in batch.items():
            if isinstance(value, Tensor):
                self._buffers[name].copy_(value, non_blocking=True)
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._replay()
        return {name: value.clone() for name, value in self._outputs.items()}

    def _frozen(self, batch: Batch) -> Any:
        shapes = {name: (value.shape, value.dtype) if isinstance(value, Tensor) else value for name, value in batch.items()}
        settings = [{key: value for key, value in group.items() if key not in _MOVING} for group in self.optimizer.param_groups]
        return shapes, settings, self.frozen()

    def _capture(self, batch: Batch, key: Any) -> None:
        self._buffers = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
        device = next(value.device for value in batch.values() if isinstance(value, Tensor))
        self._rates = [torch.full((), group["lr"], dtype=torch.float32, device=device) for group in self.optimizer.param_groups]
        self._bad = torch.zeros((), device=device) if self._bad is None else self._bad
        self._drop()
        self._replay, self._outputs = self.capture(self._step, self._passes, device)
        self._key, self.captures = key, self.captures + 1

    def _drop(self) -> None:
        """Gradients; those of the graph come from its own memory."""
        self.optimizer.zero_grad(set_to_none=True)

    def _passes(self) -> tuple[Tensor, Outputs]:
        self._drop()
        loss, outputs = self.forward(self._buffers)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), outputs

    def _step(self) -> Outputs:
        loss, outputs = self._passes()
        assert self._bad is not None
        self._bad.copy_(torch.maximum(self._bad, (~torch.isfinite(loss)).float()))
        norm = self.clip()
        with self._in_buffers():
            self.optimizer.step()
        return {"loss": loss, **outputs, **({} if norm is None else {"norm": norm})}

    @contextmanager
    def _in_buffers(self) -> Any:
        """The optimizer reads its rates, and whether it is to step at all, where replays find them; that it may be captured is
        said here alone, as a checkpoint that said it would not go on on a CPU."""
        parts, groups = parts_of(self.optimizer), self.optimizer.param_groups
        told = [(getattr(part, "found_inf", None), part.defaults.get("capturable")) for part in parts]
        before = [(group["lr"], group.get("capturable")) for group in groups]
        for part in parts:
            part.found_inf, part.defaults["capturable"] = self._bad, True  # type: ignore[attr-defined]
        for group, rate in zip(groups, self._rates, strict=True):
            group.update(lr=rate, capturable=True)
        try:
            yield
        finally:
            for group, (lr, capturable) in zip(groups, before, strict=True):
                group.update(lr=lr, capturable=capturable)
            for part, (found, capturable) in zip(parts, told, strict=True):
                part.found_inf, part.defaults["capturable"] = found, capturable  # type: ignore[attr-defined]


_MOVING = ("params", "lr")
"""Of an optimizer's groups what is no part of a graph."""
