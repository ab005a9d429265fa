"""Perplexity of each stage of a run on each of its texts, and the equality of what was trained and what was packed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.config import TrainConfig
from qat.metrics.perplexity import Window, exp_mean, log_likelihood, windows
from qat.reporting.result import RunResult

if TYPE_CHECKING:
    from qat.data import QATData


@dataclass
class Measure:
    """Call it with a stage and a model; the perplexities land in `result`."""

    texts: dict[str, Tensor]
    """Name -> tokens int64 [T]. The recipe's own evaluation text has the name ''."""
    windows: dict[str, list[Window]]
    """Name -> what is scored of them; of chats the assistant's words."""
    context: int
    stride: int
    batch_size: int
    device: torch.device
    result: RunResult

    @classmethod
    def of(cls, config: TrainConfig, data: QATData, tokenizer: Any, result: RunResult) -> Measure:
        """The texts of a run's configuration, cut to eval.max_tokens."""
        from qat.data import text_tokens

        limit = config.eval.max_tokens
        context = config.eval.context or config.data.sequence_length
        stride = config.eval.stride or context
        texts = {"": data.eval_tokens[:limit]}
        texts |= {name: text_tokens(source, tokenizer, config.data, limit) for name, source in config.eval.texts.items()}
        about = {"context": context, "stride": stride}
        shape = context, stride, config.eval.batch_size
        scored = {"": data.eval_windows(*shape, limit)}
        scored |= {name: list(windows(tokens, *shape)) for name, tokens in texts.items() if name}
        count = sum(ids[:, start:].numel() for ids, start in scored[""]) if config.data.kind == "chat" else len(texts[""])
        result.perplexity = {"text": data.eval_name, "tokens": count, **about}
        result.further = {name: {"text": name, "tokens": len(texts[name]), **about} for name in config.eval.texts}
        on_gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
        return cls(texts, scored, context, stride, config.eval.batch_size, torch.device("cuda" if on_gpu else "cpu"), result)

    def __call__(self, stage: str, model: nn.Module) -> None:
        """Measure `model` on every text; it is left in eval mode on the CPU."""
        self.place(model)
        for name, scored in self.windows.items():
            value = exp_mean(*log_likelihood(model, scored))
            (self.result.further[name] if name else self.result.perplexity)[stage] = value
        model.cpu()
        self.result.save(Path(self.result.folder))
        print(f"perplexity {stage.replace('_', ' ')}: {self.result.perplexity[stage]:.3f}", flush=True)

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
        return self.texts[""][: self.context][None]


def same_outputs(trained: nn.Module, packed: nn.Module, measure: Measure) -> dict[str, Any]:
    """Compare trained latent and packed model; both run the same integer arithmetic, so they must agree to the bit.

    Raises:
        ValueError: logits of the probe window or perplexities differ.
    """
    with torch.inference_mode():
        a, b = (measure.logits(model) for model in (trained, packed))
    difference = (a - b).abs().max().item()
    values = measure.result.perplexity
    if difference != 0 or values["trained"] != values["packed"]:
        raise ValueError(
            f"packed and trained model differ: logits by up to {difference:.3g}, perplexity {values['packed']} against"
            f" {values['trained']}; please report this with the run's config.yaml"
        )
    return {"packed_max_logit_difference": difference, "summary": ["packed = trained to the bit (logits and perplexity)"]}
