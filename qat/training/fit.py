"""One training with lightning: trainer, callbacks and metrics.csv put together, checkpoint to continue from."""

from __future__ import annotations

import logging
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger

from qat.config import TrainerConfig
from qat.losses import measured
from qat.training.callbacks import Checkpoint, GracefulInterrupt, NonFiniteGuard, RandomState, Throughput, progress
from qat.training.metrics_file import WriteRows, continued
from qat.training.module import QATModule


@dataclass
class FitResult:
    """What a training did: optimizer `step` reached, `tokens` and `seconds` over all of it, resumed parts included."""

    step: int
    tokens: int
    seconds: float
    interrupted: bool


def fit(
    module: QATModule,
    data: pl.LightningDataModule,
    config: TrainerConfig,
    *,
    name: str,
    folder: Path,
    loggers: list[Logger] | None = None,
    callbacks: list[pl.Callback] | None = None,
) -> FitResult:
    """Train `module` to config.max_steps, from folder/checkpoints/last.ckpt where there is one.

    Raises:
        ValueError: a damaged checkpoint; a precision that the device lacks; a loss or a weight that is not finite.
    """
    check_hardware(config)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    resumed_step = read_step(checkpoint) if checkpoint.exists() else None
    every = min(config.log_every_n_steps, config.max_steps)
    metrics = continued(folder / "metrics.csv", columns(module), resumed_step)
    throughput, interrupt = Throughput(every), GracefulInterrupt()
    saver = Checkpoint(checkpoint, config.checkpoint_every)
    ours = [NonFiniteGuard(), throughput, RandomState(), interrupt, *(callbacks or []), WriteRows(metrics, every), saver]
    if config.progress:
        ours.append(progress(name))
    trainer = build_trainer(config, ours, [metrics, *(loggers or [])])
    with _quiet():
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint if resumed_step is not None else None, weights_only=True)
    for logger in loggers or []:
        _close(logger)
    return FitResult(trainer.global_step, throughput.tokens, throughput.seconds, interrupt.interrupted)


def _close(logger: Logger) -> None:
    """Weights & Biases' last words come now, and not after the run's table, when the process ends."""
    finish = getattr(getattr(logger, "experiment", None), "finish", None)
    if callable(finish):
        finish()


def build_trainer(config: TrainerConfig, callbacks: list[pl.Callback], loggers: list[Logger]) -> pl.Trainer:
    """lightning's Trainer. Intervals of the config are optimizer steps, lightning's are batches."""
    accumulate = config.accumulate_grad_batches
    with _quiet():
        return pl.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=config.strategy,
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
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks),
            use_distributed_sampler=False,
        )


def check_hardware(config: TrainerConfig) -> None:
    """Refuse what lightning would change silently (16-mixed on a CPU becomes bf16-mixed) or what a run cannot do yet."""
    on_gpu = config.accelerator != "cpu" and torch.cuda.is_available()
    if config.precision == "16-mixed" and not on_gpu:
        raise ValueError("trainer.precision=16-mixed needs a CUDA GPU; on a CPU use bf16-mixed or 32-true")
    if config.devices * config.num_nodes > 1:
        raise ValueError(
            f"trainer.devices={config.devices}, trainer.num_nodes={config.num_nodes}: allowed is 1 of each, as a run uses one"
            " device for now; for several GPUs start one run on each, by CUDA_VISIBLE_DEVICES"
        )
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=gpu, but torch finds no CUDA GPU; use trainer=cpu, or a CUDA build of torch")


def read_step(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint, read without executing anything that it may hold.

    Raises:
        ValueError: the file is damaged or is no checkpoint of qat.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return int(content["global_step"])
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__
        raise ValueError(f"{checkpoint} is damaged or no checkpoint of qat: {reason}") from error


def columns(module: QATModule) -> list[str]:
    """What a training writes into metrics.csv, known before it begins."""
    names = ["loss", *measured(module.distill)]
    return ["train/tokens_per_second", *(f"{part}/{name}" for part in ("train", "val") for name in names)]


_NOISE = (
    "does not have many workers",
    "Experiment logs directory",
    "treespec",
    "`isinstance",
    "Checkpoint directory",
    "smaller than the logging interval",
)


class _quiet(warnings.catch_warnings):
    """Without lightning's notes about devices, tips and loader workers, which say nothing about the run."""

    def __enter__(self) -> None:  # type: ignore[override]
        super().__enter__()
        for pattern in _NOISE:
            warnings.filterwarnings("ignore", message=f".*{pattern}.*")
        for logger in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
            logging.getLogger(logger).setLevel(logging.WARNING)
