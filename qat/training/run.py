"""The main job, from a pretrained model to verified, packed, exported weights, readable from top to bottom."""

from __future__ import annotations

import copy

from lightning.pytorch import seed_everything

from qat.config import TrainConfig
from qat.conversion import walker as conversion
from qat.formats.dtypes import round_floats
from qat.models import hub as models
from qat.reporting.result import RunResult
from qat.training import fit
from qat.training import steps as runs
from qat.training.exports import export_all, save_packed
from qat.training.plugins import optimizer_factory, plugins
from qat.training.stages import Measure, same_outputs


def run(config: TrainConfig) -> RunResult:
    """Load, convert, train, verify, pack and export; everything measured is in the result and in the run's folder.

    Raises:
        ValueError: a configuration, file, model or value that cannot work; the message says what, where and what is allowed.
    """
    config.check()
    fit.check_hardware(config.trainer)
    optimizer = optimizer_factory(config)
    if config.resume:
        runs.check_resume(config.resume)
    runs.set_threads(config.trainer.threads)
    seed_everything(config.seed, verbose=False)

    tokenizer = models.load_tokenizer(config.model)
    data = runs.open_data(config, tokenizer)
    base = models.load_model(config.model)
    models.check_vocabulary(base, tokenizer)
    models.check_context(base, config.data.sequence_length)
    student = copy.deepcopy(base)
    record = conversion.convert(student, config.quant, include=config.model.include or None, exclude=config.model.exclude or None)
    print(f"{config.model.path}: {record.summary()}")
    if config.dry_run:
        return runs.dry_run(config, base, student, record)

    folder = runs.open_folder(config)
    result = runs.new_result(config, folder, base, record)
    with runs.recording(result, folder):
        teacher = runs.load_teacher(config, base)
        data = data or runs.sampled_data(config, tokenizer, base)
        measure = Measure.of(config, data, tokenizer, result)
        measure("full_precision", base)
        measure("converted", student)

        extras = plugins(config, folder)
        outcome = runs.train_student(config, student, teacher, data, tokenizer, folder, optimizer, extras)
        result.count(outcome)
        if outcome.interrupted:
            result.status = f"interrupted at step {outcome.step}; continue with resume={folder}"
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
            outcome = runs.train_control(config, base, data.afresh(), folder, optimizer)
            if outcome.interrupted:
                result.status = f"interrupted in the control run; continue with resume={folder}"
                return result
            result.control = {"tokens": outcome.tokens, "seconds": outcome.seconds, "lr": config.control.lr}
            measure("control", base)
        result.status = "done"
    return result
