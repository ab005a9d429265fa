"""The two trainings of a run: the student's, which may have a teacher, and the control's."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from torch import nn

from qat import parallel
from qat.config import DistillConfig, TrainConfig, TrainerConfig
from qat.conversion.layers import set_norm_blend
from qat.data import QATData
from qat.losses import active, needs, setting
from qat.losses.relation import settled
from qat.losses.taps import TAPS
from qat.tasks import TASKS
from qat.terminal.stage import stage
from qat.training.callbacks import Anneal, LambdaWarmup, NormWarmup, Oscillation, Samples
from qat.training.fit import FitResult, device_of, fit
from qat.training.gradients.terms import TermGradients
from qat.training.graph.module import ReplayedModule
from qat.training.module import OptimizerFactory, QATModule
from qat.training.monitoring.alarming import Alarming
from qat.training.monitoring.looks import Monitor
from qat.training.monitoring.reference import References
from qat.training.signals import Signals
from qat.training.strategies.placing import give_back, placing
from qat.training.tasks import code_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Plugins = tuple[list[Any], list[Callback]]


def total_batches(trainer: TrainerConfig) -> int:
    """Batches on each device that a whole run takes."""
    return trainer.max_steps * trainer.accumulate_grad_batches


def check_teacher(config: TrainConfig) -> None:
    """Raise ValueError where a loss needs a teacher and none is allowed."""
    for name in needs(config.distill, "teacher"):
        if config.model.teacher == "off":
            raise ValueError(f"{setting(config.distill, name)} needs a teacher, but model.teacher=off; set one of them")


def load_teacher(config: TrainConfig, base: PreTrainedModel, loaded: PreTrainedModel | None = None) -> PreTrainedModel | None:
    """The model whose distribution the student learns, or None where the loss does not ask for one."""
    if not needs(config.distill, "teacher"):
        return None
    if loaded is not None and config.model.teacher != "shared":
        return loaded
    narrow = config.model.teacher_dtype != "float32"
    if config.model.teacher == "shared":
        return _narrowed(config, copy.deepcopy(base)) if narrow else base
    with stage(f"loading the teacher {config.model.teacher}"):
        return _narrowed(config, code_of(config).load_teacher(config, base))


def _narrowed(config: TrainConfig, teacher: PreTrainedModel) -> PreTrainedModel:
    """With weights of model.teacher_dtype; buffers, such as the frequencies of positions, stay as they are."""
    dtype = getattr(torch, config.model.teacher_dtype)
    for parameter in teacher.parameters():
        parameter.data = parameter.data.to(dtype)
    teacher.config.dtype = dtype
    return teacher


def check_comparable(config: TrainConfig, student: nn.Module, teacher: nn.Module | None) -> None:
    """Raise ValueError where a loss compares what student and teacher do not both have."""
    distill = settled(config.distill, student)
    for what, kind in TAPS.items():
        for name in needs(distill, what):
            kind.check(student, teacher, distill, setting(distill, name))  # type: ignore[arg-type]


def train_student(
    config: TrainConfig,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    data: QATData,
    tokenizer: Any,
    folder: Path,
    optimizer: OptimizerFactory,
    plugins: Plugins,
    signals: Signals,
) -> FitResult:
    """Quantization-aware training of the converted student, in place; resumes from the folder's checkpoint."""
    loggers, callbacks = plugins
    callbacks = [*callbacks]
    if config.optim.annealed:
        callbacks.append(Anneal(config.optim, config.trainer.max_steps))
    if config.optim.lambda_steps:
        callbacks.append(LambdaWarmup(config.optim.lambda_steps, config.optim.lambda_schedule))
    if config.optim.rms_norm_steps:
        callbacks.append(NormWarmup(config.optim.rms_norm_steps))
    if config.optim.damping or config.optim.freeze_oscillation is not None:
        callbacks.append(Oscillation(config.optim, config.trainer.max_steps))
    if config.trainer.samples and config.trainer.val_every and TASKS[config.task].generates:
        callbacks.append(Samples(prompts(config, data), tokenizer, folder / "samples.md"))
    if len(active(config.distill)) > 1 and (config.distill.balance or config.trainer.val_every):
        callbacks.append(TermGradients(config.distill.balance, config.trainer.val_every))
    if config.trainer.monitor_every is not None:
        monitor = Monitor(folder, config.trainer.monitor_every)
        callbacks += [monitor, *([Alarming(folder, config, monitor)] if parallel.first() else [])]
    place = placing(config.trainer, device_of(config.trainer))
    for callback in callbacks:
        if isinstance(callback, References):
            callback.place = place
    module = _module(config, trained := place(student), config.distill, optimizer, place(teacher), data)
    try:
        outcome = fit(module, data, config.trainer, signals, name="QAT", folder=folder, loggers=loggers, callbacks=callbacks)
    finally:
        module.release()
    give_back(trained, student)
    set_norm_blend(student, 1.0)  # also where a resumed run had no step left
    student.eval()
    return outcome


def train_control(
    config: TrainConfig, base: PreTrainedModel, data: QATData, folder: Path, optimizer: OptimizerFactory, signals: Signals
) -> FitResult:
    """The full-precision model fine-tuned by cross-entropy on the same tokens at its own learning rate, in place."""
    plain: dict[str, Any] = {
        "latent_lr_multiplier": 1.0,
        "lambda_steps": 0,
        "lambda_schedule": "linear",
        "rms_norm_steps": 0,
        "anneal": "none",
    }
    optim = replace(config.optim, lr=config.control.lr, **plain)
    base.requires_grad_(True)
    trained = placing(config.trainer, device_of(config.trainer))(base)
    module = _module(replace(config, optim=optim), trained, DistillConfig(ce=1.0, kl=0.0), optimizer, None, data)
    outcome = fit(module, data, config.trainer, signals, name="control", folder=folder / "control")
    give_back(trained, base)
    base.eval()
    return outcome


def _module(
    config: TrainConfig,
    model: PreTrainedModel,
    distill: DistillConfig,
    optimizer: OptimizerFactory,
    teacher: nn.Module | None,
    data: QATData,
) -> QATModule:
    model.train()
    if config.trainer.activation_checkpointing:
        model.activation_checkpointing_enable()
    code, steps = code_of(config), config.trainer.max_steps
    exact = config.trainer.gradient_sums == "float64"
    more = {"compile": config.trainer.compile, "view": code.view, "scores": code.scores(data), "exact": exact}
    if not config.trainer.graph:
        return QATModule(model, distill, config.optim, optimizer, steps, teacher, **more)  # type: ignore[arg-type]
    module = ReplayedModule(model, distill, config.optim, optimizer, steps, teacher, **more)  # type: ignore[arg-type]
    module.looks = config.trainer.monitor_every
    return module


def prompts(config: TrainConfig, data: QATData) -> torch.Tensor:
    """The first tokens of held-out sequences."""
    length, count = min(16, config.data.sequence_length // 2), config.trainer.samples
    tokens = data.eval_tokens
    starts = [i * config.data.sequence_length for i in range(count) if i * config.data.sequence_length + length <= len(tokens)]
    return torch.stack([tokens[s : s + length] for s in starts])
