"""The main job, from a pretrained model to verified, packed, exported weights: prepare, train, finish.

Steps return facts; `qat.training.recording` makes the result of them.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from lightning.pytorch import Callback, seed_everything
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qat import parallel
from qat.calibration.start import calibrated, check_calibrated_start
from qat.config import TrainConfig
from qat.config.run import AUTO
from qat.conversion import walker as conversion
from qat.conversion.layers import bitlinears, full_precision_bf16
from qat.conversion.record import Conversion
from qat.data import QATData
from qat.data.account import account
from qat.data.opening import sampled_data
from qat.evaluation.budget import check_budget
from qat.evaluation.damage import damage_map
from qat.evaluation.mixing import calibration, mix_components
from qat.formats.dtypes import round_floats
from qat.models import hub as models
from qat.reporting import estimate, rates, updates
from qat.reporting.page.reading import DAMAGE
from qat.reporting.result import RunResult, read_result
from qat.reporting.settling import passes, settled, validated_once, with_data
from qat.storage import write_text
from qat.terminal.lines import say
from qat.terminal.stage import quietly, stage
from qat.training import fit, graph
from qat.training.checkpoints import newest
from qat.training.exports import export_all, save_packed, unwritten
from qat.training.folder import check_target, locked, opened
from qat.training.loggers import Trackers, tracked
from qat.training.loggers.identity import about
from qat.training.monitoring.evidence import keep
from qat.training.monitoring.reference import References
from qat.training.plugins import callbacks, check_plugins, instantiated, optimizer_factory
from qat.training.recording import Book, Facts, assembled, config_hash, recording, versions
from qat.training.release.best import check_best, chosen
from qat.training.release.hub import check_push, publish
from qat.training.signals import Signals, listening
from qat.training.stages import same_outputs
from qat.training.strategies.codes import check_gather
from qat.training.strategies.divisible import check_divisible, check_resting
from qat.training.strategies.launch import started
from qat.training.strategies.sameness import same_data, same_model, same_texts, use_threads
from qat.training.sweeps.again import answered
from qat.training.tasks import Measure, code_of
from qat.training.trainings import check_comparable, check_teacher, load_teacher, total_batches, train_control, train_student


def run(config: TrainConfig) -> RunResult:
    """Load, convert, train, verify, pack and export; everything measured is in the result and in the run's folder.

    A signal ends it with a status that says how to go on, and `result.signal`; before there is a folder, with `Interrupted`.

    Raises:
        ValueError: a configuration, file, model or value that cannot work; the message says what, where and what is allowed.
    """
    with listening() as signals, started(config) as config, quietly(not config.trainer.progress):
        auto, config = config.resume == AUTO, parallel.shared(lambda: answered(settled(config)))
        if (result := parallel.shared(lambda: finished(config, auto))) is not None:
            return result
        if not config.resume and not config.dry_run:
            parallel.shared(lambda: check_target(config))
        job = prepare(config)
        config = job.config
        if config.dry_run:
            return dry_run(job)
        with opened(config) as folder, tracked() as trackers, recording(Facts(config, job.record, str(folder))) as book:
            parallel.shared(lambda: trackers.open(config, about(config, folder, job.record, job.base, versions()), instantiated))
            measure = start(job, book)
            if tune(job, book, measure, signals) is None and train(job, book, measure, signals, trackers) is None:
                finish(job, book, measure, signals)
        return book.result


def finished(config: TrainConfig, auto: bool = False) -> RunResult | None:
    """Check the run to resume before anything is loaded; its result where nothing is left to do.

    Args:
        auto: nobody asked for more of it, so that one which a callback stopped is finished.
    """
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
    if result is None or result.config_hash != config_hash(config):
        return None
    if auto and result.status.startswith("stopped"):
        print(f"{folder} {result.status}; to train on nevertheless: {quote(f'resume={folder}')}")
        return result
    if found.step < most or result.status != "done":
        return None
    print(f"{folder} is done, {found.step} of {most} steps; raise trainer.max_steps to train on")
    return result


@dataclass
class Job:
    """What a run works with."""

    config: TrainConfig
    base: PreTrainedModel
    """The model in full precision."""
    student: PreTrainedModel
    """Its converted copy, which is trained."""
    record: Conversion
    tokenizer: PreTrainedTokenizerFast
    optimizer: Any
    callbacks: list[Callback]
    teacher: PreTrainedModel | None
    """The model that the losses compare with, where one asks for it."""
    data: QATData | None
    """None until the model has sampled it."""


@parallel.as_one()
def prepare(config: TrainConfig) -> Job:
    """Check everything that can be checked, then load the model and convert a copy of it."""
    config = settled(config)
    config.check()
    check_budget(config.quant, config.export.layout)
    check_teacher(config)
    check_calibrated_start(config)
    fit.check_hardware(config.trainer)
    optimizer = optimizer_factory(config)
    check_divisible(config, optimizer)
    check_resting(optimizer, fit.device_of(config.trainer))
    check_plugins(config)
    check_best(config, asked := callbacks(config))
    graph.check_graph(config, fit.device_of(config.trainer), asked)
    check_push(config)
    use_threads(config.trainer)
    seed_everything(config.seed, verbose=False)
    tokenizer, code = models.load_tokenizer(config.model), code_of(config)
    with parallel.before_others():
        data = code.open_data(config, tokenizer, total_batches(config.trainer))
    same_data(data)
    config = with_data(config, data)
    with stage(f"loading {config.model.path}"):
        base = code.load_model(config, data)
    same_model(base)
    models.check_vocabulary(base, tokenizer)
    models.check_context(base, config.data.sequence_length)
    student, record = converted(config, base, data)
    say(f"{config.model.path}: {record.summary()}", *unwritten(config, student, tokenizer))
    if config.optim.lr is None:
        config = rates.rated(config, parameters := base.num_parameters())
        say(rates.in_words(config, parameters))
    teacher = load_teacher(config, base)
    check_comparable(config, student, teacher)
    check_gather(config.trainer, student)
    return Job(config, base, student, record, tokenizer, optimizer, asked, teacher, data)


def converted(config: TrainConfig, base: PreTrainedModel, data: QATData | None) -> tuple[PreTrainedModel, Conversion]:
    """A converted copy of a model, and what was converted."""
    student = copy.deepcopy(base).to(fit.device_of(config.trainer))  # type: ignore[arg-type]  # where the probe tries it
    include, exclude = config.model.include or None, config.model.exclude or None
    probe = code_of(config).probe(data, base)
    with stage("converting"):
        record = conversion.convert(student, config.quant, include=include, exclude=exclude, probe=probe)
    return student.cpu(), record  # type: ignore[call-arg,return-value]


def start(job: Job, book: Book) -> Measure:
    """Sample the data where the model writes it, and measure the model as it came."""
    say(*updates.lines(job.config))
    if validated_once(job.config.trainer):
        say(f"trainer.val_every={job.config.trainer.val_every} is above trainer.max_steps: one validation, at the end")
    if job.data is None:
        job.data = sampled_data(job.config, job.tokenizer, job.base, total_batches(job.config.trainer))
    if said := passes(job.config, job.data):
        say(said)
    measure = (code := code_of(job.config)).measure(job.config, job.data, job.tokenizer)
    same_texts([*vars(measure).values()])
    book.add(data=account(job.data), texts=measure.about, bytes={"full_precision_bf16": full_precision_bf16(job.base)})
    if code.ready(job.config):
        measured(job, book, measure, "full_precision", job.base)
    return measure


def measured(job: Job, book: Book, measure: Measure, name: str, model: PreTrainedModel) -> None:
    """Measure a stage of the run, and keep what its report shows of it."""
    assert job.data is not None
    book.measured(name, measure(model))
    place = job.config, job.data, job.tokenizer, measure, name, model, Path(book.facts.folder)
    parallel.shared(lambda: keep(*place))


def tune(job: Job, book: Book, measure: Measure, signals: Signals) -> int | None:
    """Train the control first, where it is what QAT starts from; the signal that interrupted it, None where QAT may begin."""
    if not job.config.control.first:
        return None
    if (signal := control(job, book, measure, signals)) is None:
        seed_everything(job.config.seed, verbose=False)  # a resume does not draw what the control's training drew
        job.student, job.record = converted(job.config, job.base, job.data)
        job.teacher = load_teacher(job.config, job.base, job.teacher)  # a shared one is what the control has become
    return signal


def control(job: Job, book: Book, measure: Measure, signals: Signals) -> int | None:
    """Train the control, in place of the model as it came; the signal that interrupted it."""
    assert job.data is not None
    done = train_control(job.config, job.base, job.data.afresh(), Path(book.facts.folder), job.optimizer, signals)
    if done.signal is not None:
        book.interrupted(done.signal, control=True)
        return done.signal
    book.add(control=done)
    book.measured("control", measure(job.base))
    return None


def map_damage(job: Job, measure: Measure, folder: Path) -> None:
    """What quantizing each layer costs, for the report, where eval.damage asks for it; a resumed run keeps what it has."""
    if job.config.eval.damage is None or (folder / DAMAGE).exists():
        return
    assert job.data is not None
    layers = {name: layer.config for name, layer in bitlinears(job.student)}
    scored = calibration(job.data, job.config.eval.damage)
    found = damage_map(measure.place(job.base), layers, scored, progress=job.config.trainer.progress)
    write_text(folder / DAMAGE, json.dumps(found.to_dict(), indent=2))


def train(job: Job, book: Book, measure: Measure, signals: Signals, trackers: Trackers) -> int | None:
    """Calibrate and measure the student, and train it; the signal that interrupted it, None where it may be finished."""
    assert job.data is not None
    parallel.shared(lambda: map_damage(job, measure, Path(book.facts.folder)))
    mix_components(job.config, measure.place(job.base), job.student, job.record, job.data, Path(book.facts.folder))
    job.base.cpu()
    book.add(calibration=calibrated(job.config, job.base, job.student, job.data.train, fit.device_of(job.config.trainer)))
    measured(job, book, measure, "converted", job.student)
    folder = Path(book.facts.folder)
    if parallel.first() and newest(folder / "checkpoints") is None:
        trackers.histograms(job.student, 0)
    extras = trackers.loggers, [*job.callbacks, *references(job)]
    done = train_student(job.config, job.student, job.teacher, job.data, job.tokenizer, folder, job.optimizer, extras, signals)
    trackers.histograms(job.student, done.step)
    book.add(training=done)
    if done.signal is not None:
        book.interrupted(done.signal)
    return done.signal


def references(job: Job) -> list[Callback]:
    """What validations compare with: the model in full precision, where its head is trained by now, and the teacher."""
    known = code_of(job.config).ready(job.config) or job.config.control.first
    models = {"full_precision": job.base} if known else {}
    found = {**models, **({"teacher": job.teacher} if job.teacher is not None else {})}
    return [References(found)] if found and job.config.trainer.val_every else []


def finish(job: Job, book: Book, measure: Measure, signals: Signals) -> None:
    """Measure what was trained, pack it, prove that the packed model is the same, export it, and train the control."""
    assert job.data is not None and book.facts.training is not None
    config, folder, done = job.config, Path(book.facts.folder), book.facts.training
    book.add(chosen=chosen(config, job.callbacks, job.student, done.step))
    round_floats(job.student, config.export.floats)  # to what will be stored, so that it is what is measured
    measured(job, book, measure, "trained", job.student)
    packed = measure.place(copy.deepcopy(job.student))  # packed where it was trained: the kernels there are warm
    with stage("packing"):
        packing = replace(conversion.pack(packed, layout=config.export.layout), skipped=job.record.skipped)
    measured(job, book, measure, "packed", packed)
    book.add(logit_difference=same_outputs(job.student, packed, measure, book.facts.stages))
    sizes = parallel.shared(lambda: save_packed(config, packed, packing, folder, job.tokenizer))
    book.add(bytes={**book.facts.bytes, **sizes})
    values = config, packed, folder, job.tokenizer, measure, book.result.measured
    book.add(exports=parallel.shared(lambda: export_all(*values)))
    if config.control.enabled and not config.control.first and control(job, book, measure, signals) is not None:
        return
    book.add(hub=publish(config, folder, book.result))
    book.add(status=f"stopped at step {done.step} by {done.stopped_by}" if done.stopped_by else "done")


def dry_run(job: Job) -> RunResult:
    """Print coverage, memory and tokens of the run that is not made."""
    sample = code_of(job.config).sample(job.config)
    print(*estimate.lines(job.config, job.base, job.student, job.teacher, sample, job.optimizer), sep="\n")
    if job.data is not None and (said := passes(job.config, job.data)):
        print(f"text            {said}")
    return assembled(Facts(job.config, job.record, status="dry run"))
