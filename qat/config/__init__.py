"""Every configuration of ours: typed dataclasses, a file a section, and their checks.

Standard library only, so that `qat.QuantConfig` costs nothing to import; what is Hydra's lies in `qat.config.compose`. The
classes are not frozen because Hydra cannot compose frozen ones; `__post_init__` checks values after composition, and every
message names the key, the value and what is allowed.
"""

from __future__ import annotations

from qat.config.data import DataConfig, SelfgenConfig
from qat.config.evaluation import ControlConfig, EvalConfig
from qat.config.export import ExportConfig
from qat.config.losses import DistillConfig
from qat.config.model import ModelConfig
from qat.config.optim import OptimConfig
from qat.config.quant import QuantConfig
from qat.config.run import RunConfig, TrainConfig
from qat.config.trainer import TrainerConfig

__all__ = [
    "ControlConfig",
    "DataConfig",
    "DistillConfig",
    "EvalConfig",
    "ExportConfig",
    "ModelConfig",
    "OptimConfig",
    "QuantConfig",
    "RunConfig",
    "SelfgenConfig",
    "TrainConfig",
    "TrainerConfig",
]
