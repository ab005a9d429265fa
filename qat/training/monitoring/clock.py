"""Where the time of a step goes: data, forward, backward, optimizer; seconds that lightning's own hooks tell a profiler."""

from __future__ import annotations

import time

import torch
from lightning.pytorch.profilers import Profiler

BEGINS = {
    "train_dataloader_next": "data",
    "training_step": "forward",
    "backward": "backward",
    "configure_gradient_clipping": "optimizer",
}
ENDS = {"train_dataloader_next": "data", "training_step": "forward", "backward": "backward", "optimizer_step": "optimizer"}
"""The last part of an action's name -> what begins or ends with it. Forward and backward run inside of optimizer_step."""


class StepClock(Profiler):
    """Adds up the seconds of each part. A GPU is waited for where a part ends only while `exact`, which the row's step is."""

    def __init__(self) -> None:
        super().__init__(dirpath=None, filename=None)
        self.exact = True
        self.seconds = dict.fromkeys(BEGINS.values(), 0.0)
        self._begun: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        """Called by lightning."""
        if (part := BEGINS.get(action_name.rpartition(".")[2])) and (self.exact or part == "data"):
            self._begun[part] = self._now()

    def stop(self, action_name: str) -> None:
        """Called by lightning."""
        if (part := ENDS.get(action_name.rpartition(".")[2])) and part in self._begun:
            self.seconds[part] += self._now() - self._begun.pop(part)

    def _now(self) -> float:
        if self.exact and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def taken(self) -> dict[str, float]:
        """The seconds so far, which begin anew."""
        found, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return found

    def summary(self) -> str:
        """Nothing to print at the end."""
        return ""
