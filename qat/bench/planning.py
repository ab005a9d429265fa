"""The facts of a plan: the model of a configuration, its text, the device's memory, and a few timed steps."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qat.config import TrainConfig
from qat.models.attention import narrow_heads
from qat.models.weightless import size_named
from qat.planning.choosing import state_bytes
from qat.reporting import estimate, plan
from qat.tasks import TASKS
from qat.training.fit import device_of
from qat.training.gradients.clipping import clip
from qat.training.gradients.groups import parameter_groups
from qat.training.module import QATModule
from qat.training.plugins import has_betas
from qat.training.run import Job, prepare
from qat.training.tasks import code_of

WARM, TIMED = 2, 5
MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_YEAR = 24 * 365
"""In hours: the most that is planned."""


def planned(config: TrainConfig, tokens: int | None = None, hours: float | None = None) -> plan.Plan:
    """The plan of a run of this configuration for so many tokens, or so many hours on this machine.

    Raises:
        ValueError: a configuration or model that cannot work, or a budget of not one step.
    """
    if (tokens is None) == (hours is None):
        raise ValueError("give the budget as --tokens N or --hours H, one of them")
    if hours is not None and not 0 < hours <= _YEAR:
        raise ValueError(f"--hours {hours:g} is not allowed; it must be above 0 and at most {_YEAR}")
    if tokens is not None and not 0 < tokens <= 10**15:
        raise ValueError(f"--tokens {tokens:,} is not allowed; it must be in 1 to {10**15:,}")
    if size_named(config.model.path) is not None:
        raise ValueError(f"model.path={config.model.path} is a size without weights, for --on DEVICE, as h100; give a model")
    if not TASKS[config.task].whole:
        raise ValueError(
            f"a plan counts tokens of whole sequences, which task={config.task} does not have; set trainer.max_steps"
        )
    job = prepare(replace(config, optim=replace(config.optim, beta2_half_life=None)))
    found, length = facts(job), config.data.sequence_length
    if hours is None:
        assert tokens is not None
        return plan.of_tokens(found, length, tokens)
    return by_hours(job, found, length, hours)


def by_hours(job: Job, found: plan.Facts, length: int, hours: float) -> plan.Plan:
    """Sized by the rate of one sequence an update, and again by that of the batch which this gives."""
    rate = tokens_per_second(job, 1)
    first = plan.of_tokens(found, length, max(length, int(rate * 3600 * hours)), rate, True)
    if first.batch > 1:
        rate = tokens_per_second(job, first.batch)
        first = plan.of_tokens(found, length, max(length, int(rate * 3600 * hours)), rate, True)
    return first


def facts(job: Job) -> plan.Facts:
    """What is known of a prepared run."""
    trained = sum(p.numel() for p in job.student.parameters() if p.requires_grad)
    groups = job.optimizer(parameter_groups(job.student, job.config.optim)).param_groups
    return plan.Facts(
        parameters=trained,
        state_bytes=round((8 + state_bytes(job.optimizer)) * trained) + estimate.teacher_bytes(job.teacher),
        sequence_bytes=estimate.activation_bytes(job.student, code_of(job.config).sample(job.config)),
        room_bytes=room(job.config),
        text_tokens=None if job.data is None else job.data.train_tokens,
        betas=all(has_betas(group) for group in groups),
    )


def room(config: TrainConfig) -> int:
    """Bytes of memory of the device that a run takes."""
    if device_of(config.trainer).type == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def tokens_per_second(job: Job, batch: int) -> float:
    """Of whole steps of `batch` sequences of random tokens, on the device of the run; the middle one of five."""
    config, device = job.config, device_of(job.config.trainer)
    student, length = job.student.to(device).train(), config.data.sequence_length  # type: ignore[arg-type]
    module = QATModule(student, config.distill, config.optim, job.optimizer, WARM + TIMED, job.teacher)
    optimizer = job.optimizer(parameter_groups(student, config.optim))
    ids = torch.randint(job.base.config.vocab_size, (batch, length), device=device)
    if job.teacher is not None:
        job.teacher.to(device)  # type: ignore[arg-type]
    try:
        seconds = [_step(module, optimizer, ids, config) for _ in range(WARM + TIMED)]
    finally:
        module.release()
    return batch * length / median(seconds[WARM:])


def _step(module: QATModule, optimizer: Any, ids: Tensor, config: TrainConfig) -> float:
    """Seconds of one update by these tokens [B, L]."""
    start, mixed = time.perf_counter(), MIXED.get(config.trainer.precision)
    with narrow_heads(), torch.autocast(ids.device.type, mixed, enabled=mixed is not None):
        pairs = module.pairs({"input_ids": ids, "labels": ids})
    module.loss({name: total for name, (total, _) in pairs.items()}, ids.numel()).backward()
    if config.trainer.gradient_clip_val:
        clip((p for group in optimizer.param_groups for p in group["params"]), config.trainer.gradient_clip_val)
    optimizer.step()
    optimizer.zero_grad()
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
