"""The main job, from a pretrained model to verified, packed, exported weights, readable from top to bottom."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from transformers import PreTrainedModel

from qat.config import TrainConfig
from qat.conversion import walker as conversion
from qat.conversion.record import Conversion
from qat.data.opening import open_data, probe_batch, sampled_data
from qat.formats.dtypes import round_floats
from qat.models import hub as models
from qat.reporting import estimate
from qat.reporting.result import RunResult, read_result
from qat.training import fit
from qat.training.checkpoints import newest
from qat.training.exports import export_all, save_packed
from qat.training.folder import locked, opened
from qat.training.plugins import optimizer_factory, plugins
from qat.training.recording import config_hash, interrupted, new_result, recording, versions
from qat.training.signals import Signals, listening
from qat.training.stages import Measure, same_outputs
from qat.training.trainings import check_teacher, load_teacher, total_batches, train_control, train_student


def run(config: TrainConfig) -> RunResult:
    """Load, convert, train, verify, pack and export; everything measured is in the result and in the run's folder.

    A signal ends it with a status that says how to go on, and `result.signal`; before there is a folder, with `Interrupted`.

    Raises:
        ValueError: a configuration, file, model or value that cannot work; the message says what, where and what is allowed.
    """
    with listening() as signals:
        return finished(config) or _run(config, signals)


def finished(config: TrainConfig) -> RunResult | None:
    """Check the run to resume before anything is loaded; its result where nothing is left to do."""
    if not config.resume:
        return None
    folder = Path(config.resume)
    with locked(folder):
        found = newest(folder / "checkpoints")
    if found is None:
        return None
    most = config.trainer.max_steps
    if most < found.step:
        raise ValueError(f"trainer.max_steps={most} is below the step {found.step} that {found.file} has reached")
    result = read_result(folder)
    if found.step < most or result is None or result.status != "done" or result.config_hash != config_hash(config):
        return None
    print(f"{folder} is done, {found.step} of {most} steps; raise trainer.max_steps to train on")
    return result


def _run(config: TrainConfig, signals: Signals) -> RunResult:
    config.check()
    check_teacher(config)
    fit.check_hardware(config.trainer)
    optimizer = optimizer_factory(config)
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    seed_everything(config.seed, verbose=False)

    tokenizer = models.load_tokenizer(config.model)
    data = open_data(config, tokenizer, total_batches(config.trainer))
    base = models.load_model(config.model)
    models.check_vocabulary(base, tokenizer)
    models.check_context(base, config.data.sequence_length)
    student = copy.deepcopy(base)
    include, exclude = config.model.include or None, config.model.exclude or None
    record = conversion.convert(student, config.quant, include=include, exclude=exclude, probe=probe_batch(data, base))
    print(f"{config.model.path}: {record.summary()}")
    if config.dry_run:
        return dry_run(config, base, student, record)

    with opened(config) as folder, recording(result := new_result(config, folder, base, record), folder):
        teacher = load_teacher(config, base)
        data = data or sampled_data(config, tokenizer, base, total_batches(config.trainer))
        measure = Measure.of(config, data, tokenizer, result)
        measure("full_precision", base)
        measure("converted", student)

        extras = plugins(config, folder)
        outcome = train_student(config, student, teacher, data, tokenizer, folder, optimizer, extras, signals)
        result.count(outcome)
        if outcome.signal is not None:
            interrupted(result, folder, outcome.signal)
            return result
        round_floats(student, config.export.floats)  # to what will be stored, so that it is what is measured
        measure("trained", student)

        packed = measure.place(copy.deepcopy(student))  # packed where it was trained, which decides the last bit of a scale
        packing = conversion.pack(packed, layout=config.export.layout)
        packing.skipped = record.skipped
        measure("packed", packed)
        result.verify(same_outputs(student, packed, measure))
        save_packed(config, packed, packing, folder, tokenizer, result)
        export_all(config, packed, folder, tokenizer, result, measure)

        if config.control.enabled:
            control = train_control(config, base, data.afresh(), folder, optimizer, signals)
            if control.signal is not None:
                interrupted(result, folder, control.signal, "in the control run ")
                return result
            result.control = {"tokens": control.tokens, "seconds": control.seconds, "lr": config.control.lr}
            measure("control", base)
        result.status = f"stopped at step {outcome.step} by {outcome.stopped_by}" if outcome.stopped_by else "done"
    return result


def dry_run(config: TrainConfig, base: PreTrainedModel, student: PreTrainedModel, record: Conversion) -> RunResult:
    """Print coverage, memory and tokens of the run that is not made."""
    for line in estimate.lines(config, base, student, load_teacher(config, base)):
        print(line)
    result = RunResult(status="dry run", recipe=config.run.name, versions=versions(), config_hash=config_hash(config))
    result.conversion = record.facts()
    return result
