"""What the monitor costs of a step, from pairs of neighbouring steps of one real training: with and without a look, or a row.

    python benchmarks/monitor/pairs.py recipe=stories260k model.path=DIR data.train=FILE data.valid=FILE trainer.max_steps=200
    python benchmarks/monitor/pairs.py recipe=smollm2_135m data.train=FILE data.sequence_length=256 data.batch_size=1 \
        trainer.accumulate_grad_batches=1 trainer.max_steps=40

Every 4th step has a look and a row, every 2nd a row; the step before has neither. Medians of the differences, once in the default
interval each, over the median of the steps without either. Seconds are the process's, so that a busy machine changes little; with
one thread they are the clock's of a quiet one. Arguments are those of `qat.train`.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from typing import Any

import lightning.pytorch as pl
import torch

from qat.config import TrainerConfig
from qat.config.compose.composing import compose_run
from qat.train import run

ROW, LOOK = 2, 4
TIMES: list[float] = []


class Clock(pl.Callback):
    """Seconds of the process when each step begins; between two of them is all that a step does, callbacks included."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """Of the first batch of a step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            TIMES.append(time.process_time())


def differences(steps: list[float], every: int, than: int) -> list[float]:
    """Seconds that each `every`-th step took longer than the one `than` before; the first four steps warm up."""
    return [steps[i] - steps[i - than] for i in range(4, len(steps)) if (i + 1) % every == 0]


def main() -> None:
    """Train, and print the row of the benchmark."""
    settings = [
        f"trainer.log_every_n_steps={ROW}",
        f"trainer.monitor_every={LOOK}",
        "trainer.val_every=null",
        "trainer.checkpoint_every=null",
        "trainer.checkpoint_minutes=null",
        "trainer.progress=false",
        "eval.max_tokens=512",
        "export.formats=[]",
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = compose_run([*settings, *sys.argv[1:], f"run.dir={folder}/run"])
        config.callbacks = {"clock": {"_target_": f"{__name__}.Clock"}}
        run(config)
    steps = [after - before for before, after in zip(TIMES, TIMES[1:], strict=False)]
    plain = [seconds for i, seconds in enumerate(steps) if i >= 4 and (i + 1) % ROW]
    rows = differences(steps, ROW, 1)[::2]  # those without a look
    step, row, look = (statistics.median(one) for one in (plain, rows, differences(steps, LOOK, 2)))
    default = TrainerConfig()
    shares = look / (default.monitor_every or 1) / step, row / default.log_every_n_steps / step
    print(f"{len(plain)} steps without, {torch.get_num_threads()} threads; {torch.backends.cpu.get_cpu_capability()}")
    print(f"step {step:.4f} s, look {look:.4f} s, row {row:.4f} s")
    print(f"{shares[0]:.2%} looks, {shares[1]:.2%} rows and alarms, {sum(shares):.2%} in all")


if __name__ == "__main__":
    main()
