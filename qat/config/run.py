"""All sections together, with what they must agree on, and where a run is written."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat.config.checks import at_least, check_types, choose
from qat.config.data import DataConfig
from qat.config.evaluation import ControlConfig, EvalConfig
from qat.config.export import ExportConfig
from qat.config.losses import DistillConfig
from qat.config.model import ModelConfig
from qat.config.optim import OptimConfig
from qat.config.quant import QuantConfig
from qat.config.trainer import TrainerConfig
from qat.quantizers.layouts import LAYOUTS
from qat.storage import local
from qat.targets import FORMATS, refuse_file_name
from qat.tasks import TASKS

AUTO = "auto"
"""In place of the folder to continue."""


@dataclass
class RunConfig:
    """Where a run is written."""

    name: str = "run"
    """Name of the run; the recipe's by default."""
    dir: str | None = None
    """Its folder; null: runs/<name>/<time>."""
    group: str | None = None
    """What loggers group runs by; null: the sweep that it is a job of."""
    job: str | None = None
    """What this job of a sweep alone says, a part of its name in loggers; the sweep fills it in."""
    job_type: str = "train"
    """What loggers call this kind of run."""
    tags: list[str] = field(default_factory=list)
    """What loggers tag the run with."""

    def __post_init__(self) -> None:
        check_types("run", self)
        if self.name in (".", "..") or Path(self.name).name != self.name or len(os.fsencode(self.name)) > 200:
            allowed = "a plain name of at most 200 bytes, without folders (use run.dir)"
            raise ValueError(f"run.name={self.name!r} is not allowed; it must be {allowed}")
        if self.dir:
            self.dir = str(local(self.dir))
            refuse_file_name(Path(self.dir))


@dataclass
class TrainConfig:
    """All that `qat.train.run` needs."""

    task: str = "language"
    """What is learned: `language`, the next token; `classification`, the label of a text (data.text_field, data.label_field)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    data: DataConfig = field(default_factory=DataConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Further lightning callbacks, name -> `_target_` and its arguments."""
    logger: dict[str, Any] = field(default_factory=dict)
    """Further lightning loggers, name -> `_target_` and its arguments; metrics.csv is always written."""
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 0
    """Seeds python, numpy, torch, the order of the data and selfgen."""
    resume: str | None = None
    """Folder of a run to continue; `auto`: that in run.dir, where it is this very run, and where there is none a new one."""
    dry_run: bool = False
    """Load, convert, print coverage, memory and tokens, and stop."""
    trust_targets: bool = False
    """On resume: let the run's config.yaml name any `_target_`, which can run any code. It counts on the command line only."""

    def __post_init__(self) -> None:
        check_types("", self)
        choose("task", self.task, tuple(TASKS))
        if self.resume:
            self.resume = str(local(self.resume))
        at_least("seed", self.seed, 0, most=2**32 - 1)

    def check(self) -> None:
        """Raise ValueError where sections contradict each other or a value that a run needs is missing."""
        if not self.model.path:
            raise ValueError(
                "model.path is missing; give a hub id, a folder, a .gguf file, or a recipe that has one (recipe=NAME)"
            )
        for what, quant in self.quant.sources():
            if reason := quant.quantizer.unfit("ternary"):
                raise ValueError(f"{what}quant.weight={quant.weight} does not fit a run, which ends packed: {reason}")
            if reason := quant.quantizer.unfit(LAYOUTS[self.export.layout].holds):
                raise ValueError(f"{what}quant.weight={quant.weight} does not fit export.layout={self.export.layout}: {reason}")
            self._check_exports(quant)
        self._check_machine()
        self._check_targets()
        self._check_task()
        if self.distill.kl > 0 and self.model.teacher == "off":
            raise ValueError(f"distill.kl={self.distill.kl} needs a teacher, but model.teacher=off; set one of them")
        if self.optim.lambda_steps > self.trainer.max_steps:
            raise ValueError(
                f"optim.lambda_steps={self.optim.lambda_steps} is above trainer.max_steps={self.trainer.max_steps},"
                " so training would end before the model is quantized"
            )
        self._check_norms()
        self._check_codes()
        self._check_data()
        self._check_damage()

    def _check_codes(self) -> None:
        """How codes are trained fits every quantizer of the run."""
        blocks = {quant.weight: quant.quantizer.block for quant in self.quant.variants() if quant.quantizer.block > 1}
        if self.optim.freeze_oscillation is not None and blocks:
            weight, block = next(iter(blocks.items()))
            raise ValueError(
                f"optim.freeze_oscillation={self.optim.freeze_oscillation} does not fit quant.weight={weight}, whose codes are"
                f" chosen {block} at a time, so that none can be frozen alone"
            )
        if self.optim.lambda_schedule == "layerwise" and self.trainer.compile:
            raise ValueError(
                "optim.lambda_schedule=layerwise does not fit trainer.compile=true: the model would be compiled anew for each"
                " block; use linear or sigmoid"
            )
        records = [(quant.weight, quant.quantizer) for quant in self.quant.variants()]
        hard = [weight for weight, record in records if record.soft is None and not record.sharpened]
        if self.optim.annealed and hard:
            raise ValueError(
                f"optim.anneal={self.optim.anneal} does not fit quant.weight={hard[0]}, which has no soft form;"
                " use optim.anneal=none"
            )

    def _check_damage(self) -> None:
        """The map is made of next tokens."""
        if self.eval.damage is not None and not TASKS[self.task].generates:
            raise ValueError(f"eval.damage={self.eval.damage} does not fit task={self.task}, which predicts no next token")

    def _check_data(self) -> None:
        """There is a training text where one is read, and what is named as a file is there."""
        for key in ("train", "valid"):
            name = getattr(self.data, key)
            if name and Path(name).suffix in TASKS[self.task].files and not local(name).is_file():
                raise ValueError(f"data.{key}={name!r}: there is no such file")
        if self.data.kind != "selfgen" and not self.data.train:
            raise ValueError(
                f"data.train is missing; data={self.data.kind} needs a {', '.join(TASKS[self.task].files)} file or a hub data set"
            )

    def _check_norms(self) -> None:
        """What is packed has all of its norm, so a blend has to end within the run."""
        self.quant.check_norms()
        steps, blended = self.optim.rms_norm_steps, self.quant.rms_norm_start == "blended"
        if blended != bool(steps):
            needs = "needs optim.rms_norm_steps above 0" if blended else "and optim.rms_norm_steps are set together"
            raise ValueError(f"quant.rms_norm_start={self.quant.rms_norm_start}, optim.rms_norm_steps={steps}: blended {needs}")
        if steps > self.trainer.max_steps:
            raise ValueError(
                f"optim.rms_norm_steps={steps} is above trainer.max_steps={self.trainer.max_steps},"
                " so training would end before the norms are what will be stored"
            )
        if self.quant.rms_norm_start == "calibrated" and self.model.start == "ptq":
            raise ValueError(
                "quant.rms_norm_start=calibrated does not fit model.start=ptq, which fits weights to other inputs; choose one"
            )

    def _check_exports(self, quant: QuantConfig) -> None:
        """What no model of this quantizer can be exported to is known now; what depends on the model is named in the result."""
        for name in self.export.formats:
            for room, why in quant.needs.items():
                if room not in FORMATS[name].room:
                    holds = ", ".join(one for one, record in FORMATS.items() if room in record.room)
                    raise ValueError(
                        f"export.formats={name} does not fit quant.weight={quant.weight}: {why}, and the format has no room"
                        f" for {room}; take {holds}, or export.formats=[]"
                    )

    def _check_task(self) -> None:
        """The data is of a kind that the task reads, and no key is set that it does not look at."""
        task = TASKS[self.task]
        choose(f"task={self.task} with data.kind", self.data.kind, task.kinds)
        for key in task.unused:
            section, _, name = key.partition(".")
            value, usual = getattr(getattr(self, section), name), getattr(getattr(TrainConfig(), section), name)
            if value != usual:
                raise ValueError(f"{key}={value!r} means nothing to task={self.task}, which learns {task.words}; leave it out")

    def _check_machine(self) -> None:
        """More threads or workers than a machine takes end in a crash of libgomp or a swamp of processes."""
        cores = os.cpu_count() or 1
        why = f", which is four for each of this machine's {cores} cores and never less than 64"
        at_least("trainer.threads", self.trainer.threads, 1, most=max(64, 4 * cores), why=why)
        at_least("data.workers", self.data.workers, 0, most=max(64, 4 * cores), why=why)

    def _check_targets(self) -> None:
        for section in ("callbacks", "logger"):
            for name, node in getattr(self, section).items():
                target = node.get("_target_") if isinstance(node, dict) else None
                if not isinstance(target, str) or not target:
                    raise ValueError(f"{section}.{name} needs a _target_, the path of a class, and its arguments; it is {node!r}")
