"""The code of each task: what the main job asks of it, whatever is learned. `qat.tasks` has the table."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from qat.config import TrainConfig
from qat.losses.views import View
from qat.tasks import TASKS

if TYPE_CHECKING:
    from torchmetrics import MetricCollection
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from qat.data import QATData


class Measure(Protocol):
    """What a run measures of its stages."""

    about: dict[str, Any]
    """Name -> what is measured, without any stage; '' is what the run is judged by."""

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Name -> value of `model`, which is left in eval mode on the CPU."""

    def place(self, model: Any) -> Any:
        """The model, in eval mode, on the device that measures."""

    def logits(self, model: nn.Module) -> Tensor:
        """Of what is compared to the bit; the model is left in eval mode on the CPU."""


class Code(Protocol):
    """A task's module."""

    view: View
    """What batches ask of a model."""

    def open_data(self, config: TrainConfig, tokenizer: PreTrainedTokenizerFast, batches: int) -> QATData | None:
        """The data, before the model is loaded; None where the model writes it itself."""

    def load_model(self, config: TrainConfig, data: QATData | None) -> PreTrainedModel:
        """The model in full precision."""

    def load_teacher(self, config: TrainConfig, base: PreTrainedModel) -> PreTrainedModel:
        """The model that model.teacher names by its path."""

    def ready(self, config: TrainConfig) -> bool:
        """Whether the model as it is loaded can be measured: no part of it is new."""

    def probe(self, data: QATData | None, base: PreTrainedModel) -> dict[str, Any]:
        """What conversion probes the model with."""

    def sample(self, config: TrainConfig) -> dict[str, Any]:
        """One sequence of the greatest length with its labels, to count what training keeps of it."""

    def measure(self, config: TrainConfig, data: QATData, tokenizer: PreTrainedTokenizerFast) -> Measure:
        """What is measured of each stage."""

    def scores(self, data: QATData) -> MetricCollection | None:
        """What validations measure beside the losses, and log as val/..."""


def code_of(config: TrainConfig) -> Code:
    """The module of a configuration's task."""
    found: Any = import_module(TASKS[config.task].module)
    return found
