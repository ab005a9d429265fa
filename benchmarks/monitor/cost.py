"""What the monitor costs: seconds of the process inside its callbacks and hooks, over those of the whole training.

    python benchmarks/monitor/cost.py recipe=stories260k model.path=DIR data.train=FILE data.valid=FILE trainer.max_steps=400

The process's time and not the clock's, so that a busy machine changes little. Arguments are those of `qat.train`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning.pytorch as pl

from qat.config.compose.composing import compose_run
from qat.monitor.inputs import Inputs
from qat.train import run
from qat.training.monitoring.alarming import Alarming
from qat.training.monitoring.looks import Monitor
from qat.training.monitoring.optimization import Optimization
from qat.training.monitoring.speed import Speed

PARTS: dict[str, tuple[type, list[str]]] = {
    "start": (Monitor, ["on_train_start"]),
    "looks": (Monitor, ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"]),
    "inputs": (Inputs, ["_summed"]),
    "optimization": (Optimization, ["on_before_optimizer_step", "on_train_batch_end"]),
    "speed": (Speed, ["on_train_batch_start", "on_train_batch_end"]),
    "alarms": (Alarming, ["on_train_start", "on_train_batch_end", "on_validation_end"]),
    "training": (pl.Trainer, ["fit"]),
}
"""Part -> its class, and the methods whose seconds are counted; the last is the whole."""
SPENT = dict.fromkeys(PARTS, 0.0)


def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose seconds are added to the part's."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            SPENT[part] += time.process_time() - start

    return wrapper


def main() -> None:
    """Train, and print each part's share."""
    for part, (kind, methods) in PARTS.items():
        for name in methods:
            setattr(kind, name, timed(part, getattr(kind, name)))
    with tempfile.TemporaryDirectory() as folder:
        config = compose_run([*sys.argv[1:], f"run.dir={folder}/run", "export.formats=[]", "trainer.progress=false"])
        run(config)
    whole = SPENT.pop("training")
    for part, seconds in SPENT.items():
        print(f"{part:<14}{seconds:8.3f} s {100 * seconds / whole:6.2f} %")
    print(
        f"{'all of it':<14}{sum(SPENT.values()):8.3f} s {100 * sum(SPENT.values()) / whole:6.2f} % of {whole:.1f} s of training"
    )


if __name__ == "__main__":
    main()
