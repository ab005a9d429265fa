"""The steps of a run that are bookkeeping: its folder, its result, the teacher, the two trainings, the dry run."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from torch import nn

from qat.config import DistillConfig, TrainConfig, TrainerConfig
from qat.conversion.record import Conversion
from qat.data import QATData, build_datamodule, preview, text_tokens
from qat.models import hub as models
from qat.reporting import estimate
from qat.reporting.result import RunResult, write_text
from qat.training.callbacks import LambdaWarmup, Samples
from qat.training.fit import FitResult, fit, read_step
from qat.training.module import OptimizerFactory, QATModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Plugins = tuple[list[Any], list[Callback]]


def set_threads(threads: int | None) -> None:
    """torch's CPU threads, where the user gave a number."""
    if threads is not None:
        torch.set_num_threads(threads)


def total_batches(trainer: TrainerConfig) -> int:
    """Batches on each device that a whole run takes."""
    return trainer.max_steps * trainer.accumulate_grad_batches


def open_folder(config: TrainConfig) -> Path:
    """Make the run's folder and write config.yaml, or return that of the run to resume.

    Raises:
        ValueError: the folder already holds a run.
    """
    from omegaconf import OmegaConf

    if config.resume:
        return Path(config.resume)
    folder = Path(config.run.dir or f"runs/{config.run.name}/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    if (folder / "config.yaml").exists() and ((folder / "metrics.csv").exists() or (folder / "checkpoints").exists()):
        raise ValueError(f"{folder} already holds a run; continue it with resume={folder}, or choose another run.dir")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    return folder


def check_resume(folder: str) -> None:
    """Raise ValueError for a damaged checkpoint before anything else is done."""
    checkpoint = Path(folder) / "checkpoints" / "last.ckpt"
    if checkpoint.exists():
        read_step(checkpoint)


def new_result(config: TrainConfig, folder: Path, base: nn.Module, record: Conversion) -> RunResult:
    """A result with everything that is known before training."""
    from qat.formats.tensors import full_precision_bf16

    result = RunResult(recipe=config.run.name, folder=str(folder))
    result.conversion = {"converted": record.converted, "skipped": record.skipped, "summary": record.summary()}
    result.bytes = {"full_precision_bf16": full_precision_bf16(base)}
    result.versions = versions()
    result.config_hash = config_hash(config)
    return result


def versions() -> dict[str, str]:
    """What a number depends on."""
    from importlib.metadata import version

    import qat

    packages = {name: version(name) for name in ("torch", "lightning", "transformers", "numpy")}
    return {
        "qat": qat.__version__,
        "python": platform.python_version(),
        **packages,
        "machine": platform.processor() or platform.machine(),
    }


def config_hash(config: TrainConfig) -> str:
    """sha256 of the configuration without the folder it is written to, so equal work has equal hashes."""
    plain = asdict(config)
    plain.pop("run")
    plain.pop("resume")
    return hashlib.sha256(repr(sorted(plain.items())).encode()).hexdigest()[:16]


@contextmanager
def recording(result: RunResult, folder: Path) -> Iterator[None]:
    """Keep result.json readable whatever ends the run: it says `failed: ...` when an error does."""
    start = time.perf_counter()
    result.save(folder)
    try:
        yield
    except BaseException as error:
        result.status = f"failed: {error or type(error).__name__}"
        raise
    finally:
        result.seconds_total = time.perf_counter() - start
        result.save(folder)


def open_data(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> QATData | None:
    """The data, before the model is loaded: whatever is wrong with it is said at once. None where the model writes it itself.

    A dry run prints what there is of it, and a sample with what is learned.
    """
    for text in config.eval.texts.values():
        text_tokens(text, tokenizer, config.data, config.eval.max_tokens)
    if config.data.kind == "selfgen":
        return None
    data = build_datamodule(config.data, tokenizer, seed=config.seed, total_batches=total_batches(config.trainer))
    for line in data.notes:
        print(line)
    if config.dry_run:
        print(*preview.lines(data, tokenizer, config.trainer.devices * config.trainer.num_nodes), sep="\n")
    return data


def sampled_data(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, base: PreTrainedModel) -> QATData:
    """The data that the full-precision model samples."""
    batches = total_batches(config.trainer)
    return build_datamodule(config.data, tokenizer, teacher=base, seed=config.seed, total_batches=batches)


def load_teacher(config: TrainConfig, base: PreTrainedModel) -> PreTrainedModel | None:
    """The model whose distribution the student learns, or None where the loss does not ask for one."""
    if config.distill.kl == 0 or config.model.teacher == "off":
        return None
    if config.model.teacher == "shared":
        return base
    teacher = models.load_model(config.model, config.model.teacher)
    if teacher.config.vocab_size != base.config.vocab_size:
        raise ValueError(
            f"model.teacher={config.model.teacher} has {teacher.config.vocab_size} tokens in its vocabulary,"
            f" but the student has {base.config.vocab_size}; logits can only be compared over one vocabulary"
        )
    return teacher


def train_student(
    config: TrainConfig,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    data: QATData,
    tokenizer: Any,
    folder: Path,
    optimizer: OptimizerFactory,
    plugins: Plugins,
) -> FitResult:
    """Quantization-aware training of the converted student, in place; resumes from the folder's checkpoint."""
    loggers, callbacks = plugins
    callbacks = [*callbacks]
    if config.optim.lambda_steps:
        callbacks.append(LambdaWarmup(config.optim.lambda_steps))
    if config.trainer.samples and config.trainer.val_every:
        callbacks.append(Samples(_prompts(config, data), tokenizer, folder / "samples.md"))
    module = _module(config, student, config.distill, optimizer, teacher)
    outcome = fit(module, data, config.trainer, name="QAT", folder=folder, loggers=loggers, callbacks=callbacks)
    student.eval()
    return outcome


def train_control(
    config: TrainConfig, base: PreTrainedModel, data: QATData, folder: Path, optimizer: OptimizerFactory
) -> FitResult:
    """The full-precision model fine-tuned by cross-entropy on the same tokens at its own learning rate, in place."""
    optim = replace(config.optim, lr=config.control.lr, latent_lr_multiplier=1.0, lambda_steps=0)
    base.requires_grad_(True)
    module = _module(replace(config, optim=optim), base, DistillConfig(ce=1.0, kl=0.0), optimizer, None)
    outcome = fit(module, data, config.trainer, name="control", folder=folder / "control")
    base.eval()
    return outcome


def _module(
    config: TrainConfig, model: PreTrainedModel, distill: DistillConfig, optimizer: OptimizerFactory, teacher: nn.Module | None
) -> QATModule:
    model.train()
    if config.trainer.activation_checkpointing:
        model.activation_checkpointing_enable()
    return QATModule(model, distill, config.optim, optimizer, config.trainer.max_steps, teacher, compile=config.trainer.compile)


def _prompts(config: TrainConfig, data: QATData) -> torch.Tensor:
    """The first tokens of held-out sequences."""
    length, count = min(16, config.data.sequence_length // 2), config.trainer.samples
    tokens = data.eval_tokens
    starts = [i * config.data.sequence_length for i in range(count) if i * config.data.sequence_length + length <= len(tokens)]
    return torch.stack([tokens[s : s + length] for s in starts])


def dry_run(config: TrainConfig, base: PreTrainedModel, student: PreTrainedModel, record: Conversion) -> RunResult:
    """Print coverage, memory and tokens of the run that is not made."""
    for line in estimate.lines(config, base, student):
        print(line)
    result = RunResult(status="dry run", recipe=config.run.name, versions=versions(), config_hash=config_hash(config))
    result.conversion = {"converted": record.converted, "skipped": record.skipped, "summary": record.summary()}
    return result
