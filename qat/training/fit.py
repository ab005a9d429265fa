"""One training with lightning: trainer, callbacks and metrics.csv put together, checkpoint to continue from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from qat import parallel
from qat.config import TrainerConfig
from qat.losses import measured
from qat.models.attention import narrow_heads
from qat.parallel.group import noticed
from qat.training.callbacks import Checkpoint, NonFiniteGuard, RandomState, StopAtStep, Throughput, progress
from qat.training.callbacks.metrics_file import WriteRows, continued
from qat.training.callbacks.stopping import Blame, words
from qat.training.checkpoints import WholeFiles, newest
from qat.training.module import QATModule
from qat.training.monitoring.clock import StepClock
from qat.training.monitoring.optimization import Optimization
from qat.training.monitoring.speed import Speed
from qat.training.release.best import home
from qat.training.signals import Signals
from qat.training.strategies.choice import check_devices, environments, strategy_of


@dataclass(frozen=True)
class FitResult:
    """What a training did: optimizer `step` reached, `tokens` and `seconds` over all of it, resumed parts included."""

    step: int
    tokens: int
    seconds: float
    signal: int | None = None
    """The signal that interrupted it."""
    stopped_by: str | None = None
    """The callback that ended it before max_steps, and why."""

    @property
    def tokens_per_second(self) -> float:
        """The mean over all of the training."""
        return self.tokens / self.seconds if self.seconds else 0.0


def fit(
    module: QATModule,
    data: pl.LightningDataModule,
    config: TrainerConfig,
    signals: Signals,
    *,
    name: str,
    folder: Path,
    loggers: list[Logger] | None = None,
    callbacks: list[pl.Callback] | None = None,
) -> FitResult:
    """Train `module` to config.max_steps, from the newest checkpoint in folder/checkpoints where there is one.

    Raises:
        ValueError: a damaged checkpoint; a callback that cannot work; a loss or a weight that is not finite.
    """
    found = parallel.shared(lambda: newest(folder / "checkpoints", say=True))
    every = min(config.log_every_n_steps, config.max_steps)
    metrics = [continued(folder / "metrics.csv", columns(module), found.step if found else None)] if parallel.first() else []
    throughput, stopped, clock = Throughput(every, module.row), list[pl.Callback](), StepClock()
    asked = _in_folder(callbacks or [], folder)
    theirs = [one for callback in asked for one in (callback, Blame(callback, stopped))]
    ours = [progress(name)] if config.progress and parallel.first() else []
    last = [
        *(WriteRows(file, every, module.row) for file in metrics),
        StopAtStep(signals, config.val_every),
        Checkpoint(folder / "checkpoints", config),
    ]
    chain = [NonFiniteGuard(), throughput, Speed(every, clock), RandomState(), Optimization(every), *theirs, *ours, *last]
    with misconfiguration():
        trainer = build_trainer(config, chain, [*metrics, *(loggers or [])], folder, clock)
    with _quiet(), signals.wait_for_step(), misconfiguration(), narrow_heads(), noticed():
        trainer.fit(module, datamodule=data, ckpt_path=found.file if found else None, weights_only=True)
    throughput.settle()
    early = signals.asked is None and trainer.global_step < config.max_steps
    return FitResult(trainer.global_step, throughput.tokens, throughput.seconds, signals.asked, words(stopped) if early else None)


@contextmanager
def misconfiguration() -> Iterator[None]:
    """What lightning says of a callback or setting that cannot work, as ValueError."""
    try:
        yield
    except MisconfigurationException as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RuntimeError as error:
        if not str(error).startswith("Early stopping conditioned on metric"):
            raise
        raise ValueError(" ".join(str(error).split())) from error


def _in_folder(callbacks: list[pl.Callback], folder: Path) -> list[pl.Callback]:
    """With a place of their own for checkpoints that they write: checkpoints/ holds those that a resume is exact from."""
    for callback in callbacks:
        if isinstance(callback, pl.callbacks.ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(home(folder))
    return callbacks


def build_trainer(
    config: TrainerConfig, callbacks: list[pl.Callback], loggers: list[Logger], folder: Path, profiler: Profiler | None = None
) -> pl.Trainer:
    """lightning's Trainer. Intervals of the config are optimizer steps, lightning's are batches.

    Under SLURM lightning would requeue by itself, from a checkpoint written in the middle of a step, and any later run would
    go on from such a file in its root folder. So requeueing is off, and that folder is one that is never made.
    """
    accumulate = config.accumulate_grad_batches
    with _quiet():
        trainer = pl.Trainer(
            accelerator=device_of(config).type,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=strategy_of(config),
            precision=config.precision,  # type: ignore[arg-type]
            max_steps=config.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=config.gradient_clip_val,
            check_val_every_n_epoch=None,
            val_check_interval=config.val_every * accumulate if config.val_every else None,
            limit_val_batches=config.val_batches if config.val_every else 0,
            num_sanity_val_steps=0,
            log_every_n_steps=min(config.log_every_n_steps, config.max_steps),
            callbacks=callbacks,
            logger=loggers,
            profiler=profiler,
            enable_checkpointing=any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
            default_root_dir=folder / ".lightning",
            plugins=[WholeFiles(), *environments()],
            enable_model_summary=any(isinstance(callback, pl.callbacks.ModelSummary) for callback in callbacks),
            enable_progress_bar=any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks),
            use_distributed_sampler=False,
        )
    _without_its_signals(trainer)
    return trainer


def _without_its_signals(trainer: pl.Trainer) -> None:
    """lightning's handler of SIGTERM talks to other processes from within, wherever it finds this one, and each step would wait
    for a broadcast, and for the GPU, to hear of it. Ours stay, and `StopAtStep` asks all ranks."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def device_of(config: TrainerConfig) -> torch.device:
    """Where a run computes: CUDA where torch finds a GPU and `trainer.accelerator` is not `cpu`, else the CPU; never another
    accelerator, such as MPS, which lightning's own `auto` would take and our kernels do not know."""
    on_gpu = config.accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def check_hardware(config: TrainerConfig) -> None:
    """Refuse what lightning would change silently (16-mixed on a CPU becomes bf16-mixed), and devices that are not there."""
    if config.precision == "16-mixed" and device_of(config).type != "cuda":
        raise ValueError("trainer.precision=16-mixed needs a CUDA GPU; on a CPU use bf16-mixed or 32-true")
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=gpu, but torch finds no CUDA GPU; use trainer=cpu, or a CUDA build of torch")
    check_devices(config, device_of(config))


def columns(module: QATModule) -> list[str]:
    """What a training writes into metrics.csv, known before it begins."""
    names = ["loss", *measured(module.distill)]
    scores = [f"val/{name}" for name in module.scores or ()]
    return ["speed/tokens_per_second", *(f"{part}/{name}" for part in ("train", "val") for name in names), *scores]


_NOISE = (
    "does not have many workers",
    "Experiment logs directory",
    "treespec",
    "`isinstance",
    "Checkpoint directory",
    "smaller than the logging interval",
    "You have overridden `on_before_batch_transfer`",
    "sync_dist=True",
)


class _quiet(warnings.catch_warnings):
    """Without lightning's notes about devices, tips and loader workers, which say nothing about the run."""

    def __enter__(self) -> None:  # type: ignore[override]
        super().__enter__()
        for pattern in _NOISE:
            warnings.filterwarnings("ignore", message=f".*{pattern}.*")
        for logger in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
            logging.getLogger(logger).setLevel(logging.WARNING)
