"""The split of a step's time, memory and MFU in the rows of metrics.csv; tokens/s are `qat.training.callbacks.throughput`'s."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import psutil
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from qat.conversion.layers import parameter_count
from qat.data.preview import passes
from qat.training.callbacks.boundary import step_ends
from qat.training.monitoring.clock import StepClock

if TYPE_CHECKING:
    from qat.training.module import QATModule

_PER_TOKEN = 6
"""Operations a parameter and token: two forward, four backward. The teacher's are not counted, nor attention's."""


class Speed(pl.Callback):
    """`speed/...` and `train/epoch` of each row's step.

    lightning's ThroughputMonitor counts from 0 in a resumed run and knows no validations; its table of GPUs' peaks is used.
    """

    def __init__(self, every: int, clock: StepClock) -> None:
        self.every, self.clock = every, clock
        self._steps, self._peak, self._parameters = 0, 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, module: QATModule) -> None:  # type: ignore[override]
        """What does not change."""
        self.clock.taken()
        self._steps, self._parameters = 0, parameter_count(module.student)
        self._peak = float(_peak_flops(module.device, trainer.precision))

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """On a GPU only the row's step is timed: waiting for it costs."""
        self.clock.exact = module.device.type != "cuda" or (trainer.global_step + 1) % self.every == 0

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, module: QATModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The row. The optimizer's part of the clock ends before this."""
        if not step_ends(trainer, batch_idx):
            return
        self._steps += 1
        if trainer.global_step % self.every:
            return
        timed = 1 if module.device.type == "cuda" else self._steps
        for part, seconds in self.clock.taken().items():
            module.row[f"speed/{part}"] = seconds / (self._steps if part == "data" else timed)
        module.row["speed/memory"] = _memory(module.device)
        rate = module.row.get("speed/tokens_per_second")
        if rate is not None and self._peak:
            module.row["speed/mfu"] = _PER_TOKEN * self._parameters * rate / self._peak
        module.row["train/epoch"] = passes_after(trainer, trainer.global_step)
        self._steps = 0


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(psutil.Process().memory_info().rss)


def _peak_flops(device: torch.device, precision: str) -> int:
    """The peak of a known GPU in the precision of its matmuls; 0 where it is not known, as on a CPU."""
    if device.type != "cuda":
        return 0
    kind = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(precision), torch.float32)
    return get_available_flops(device, kind) or 0


def passes_after(trainer: pl.Trainer, steps: int) -> float:
    """How often so many optimizer steps go over the training sequences; of a mixture over the part that is seen most."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    batches = steps * trainer.accumulate_grad_batches * trainer.world_size
    return max(passes(data.train, batches * data.data_config.batch_size))
