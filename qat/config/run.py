"""All sections together, with what they must agree on, and where a run is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat.config.data import DataConfig
from qat.config.evaluation import ControlConfig, EvalConfig
from qat.config.export import ExportConfig
from qat.config.losses import DistillConfig
from qat.config.model import ModelConfig
from qat.config.optim import OptimConfig
from qat.config.quant import QuantConfig
from qat.config.trainer import TrainerConfig
from qat.targets import refuse_file_name


@dataclass
class RunConfig:
    """Where a run is written."""

    name: str = "run"
    """Name of the run; the recipe's by default."""
    dir: str | None = None
    """Its folder; null: runs/<name>/<time>."""

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or Path(self.name).name != self.name:
            raise ValueError(f"run.name={self.name!r} is not allowed; it must be a plain name, without folders (use run.dir)")
        if self.dir is not None:
            refuse_file_name(Path(self.dir))


@dataclass
class TrainConfig:
    """All that `qat.train.run` needs."""

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
    """Folder of a run to continue."""
    dry_run: bool = False
    """Load, convert, print coverage, memory and tokens, and stop."""

    def check(self) -> None:
        """Raise ValueError where sections contradict each other or a value that a run needs is missing."""
        if not self.model.path:
            raise ValueError(
                "model.path is missing; give a hub id, a folder, a .gguf file, or a recipe that has one (recipe=NAME)"
            )
        if reason := self.quant.quantizer.unfit("ternary"):
            raise ValueError(f"quant.weight={self.quant.weight} does not fit a run, which ends packed: {reason}")
        if self.distill.kl > 0 and self.model.teacher == "off":
            raise ValueError(f"distill.kl={self.distill.kl} needs a teacher, but model.teacher=off; set one of them")
        if self.optim.lambda_steps > self.trainer.max_steps:
            raise ValueError(
                f"optim.lambda_steps={self.optim.lambda_steps} is above trainer.max_steps={self.trainer.max_steps},"
                " so training would end before the model is quantized"
            )
        for key in ("train", "valid"):
            name = getattr(self.data, key)
            if name and Path(name).suffix in (".txt", ".jsonl", ".parquet") and not Path(name).expanduser().is_file():
                raise ValueError(f"data.{key}={name!r}: there is no such file")
        if self.data.kind != "selfgen" and not self.data.train:
            raise ValueError(
                f"data.train is missing; data={self.data.kind} needs a .txt, .jsonl or .parquet file or a hub data set"
            )
