"""Perplexity of each stage of a run on each of its texts, and the equality of what was trained and what was packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat import parallel
from qat.config import TrainConfig
from qat.data import text_tokens
from qat.metrics.perplexity import Window, exp_mean, likelihood, row_likelihoods, scored_tokens, windows
from qat.reporting.result import Perplexity
from qat.terminal.stage import stage, tracked
from qat.training.fit import device_of

if TYPE_CHECKING:
    from qat.data import QATData


@dataclass(frozen=True)
class Measure:
    """Call it with a model: text -> perplexity. The recipe's own evaluation text has the name ''."""

    about: dict[str, Perplexity]
    """Text -> what is measured on it, without any stage."""
    windows: dict[str, list[Window]]
    """Text -> what is scored of it; of chats the assistant's words."""
    first: Tensor
    """The first window of the evaluation text, int64 [1, context]."""
    context: int
    stride: int
    device: torch.device

    @classmethod
    def of(cls, config: TrainConfig, data: QATData, tokenizer: Any) -> Measure:
        """The texts of a run's configuration, cut to eval.max_tokens."""
        limit = config.eval.max_tokens
        context = config.eval.context or config.data.sequence_length
        stride = config.eval.stride or context
        shape, tokens = (context, stride, config.eval.batch_size), data.eval_tokens[:limit]
        scored = {"": data.eval_windows(*shape, limit)}
        count = scored_tokens(scored[""]) if config.data.kind == "chat" else len(tokens)
        about = {"": Perplexity(data.eval_name, count, context, stride)}
        for name, source in config.eval.texts.items():
            further = text_tokens(source, tokenizer, config.data, limit)
            scored[name] = list(windows(further, *shape))
            about[name] = Perplexity(name, len(further), context, stride)
        return cls(about, scored, tokens[:context][None], context, stride, device_of(config.trainer))

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The perplexity of `model` on every text, the same whatever the number of ranks; it is left in eval mode on the CPU."""
        self.place(model)
        found = {name: exp_mean(*self._scored(model, name)) for name in self.windows}
        model.cpu()
        return found

    def _scored(self, model: nn.Module, name: str) -> tuple[float, int]:
        """Of a text whose windows ranks share out: rank r has r, r + W, ...; rows are added in the order of the text."""
        own = self.windows[name][parallel.rank() :: parallel.size()]
        shown = tracked(own, f"perplexity on {self.about[name].text}", "batches")
        with parallel.as_one():
            found = [row_likelihoods(model, [window]) for window in shown]
        return likelihood(parallel.in_turn(found))

    def place(self, model: Any) -> Any:
        """The model, in eval mode, on the device that measures."""
        return model.eval().to(self.device)

    def logits(self, model: nn.Module) -> Tensor:
        """Of the probe, computed where perplexity is; the model is left in eval mode on the CPU."""
        found: Tensor = self.place(model)(input_ids=self.probe().to(self.device)).logits
        model.cpu()
        return found

    def probe(self) -> Tensor:
        """The first window of the evaluation text, int64 [1, context]."""
        return self.first


def same_outputs(trained: nn.Module, packed: nn.Module, measure: Any, values: dict[str, dict[str, float]]) -> float:
    """How far the logits of trained latent and packed model are apart, which is 0: both run the same integer arithmetic.

    Args:
        measure: of the run's task (`qat.training.tasks.Measure`).
        values: stage -> text -> perplexity or accuracy, of the stages `trained` and `packed`.

    Raises:
        ValueError: logits of what is probed, or values, differ.
    """
    with torch.inference_mode(), stage("comparing trained and packed model"):
        a, b = (measure.logits(model) for model in (trained, packed))
    difference = (a - b).abs().max().item()
    if difference != 0 or values["trained"] != values["packed"]:
        raise ValueError(
            f"packed and trained model differ: logits by up to {difference:.3g}, {measure.about[''].measure}"
            f" {values['packed']['']} against {values['trained']['']}; please report this with the run's config.yaml"
        )
    return difference
