"""Classifiers: texts, or pairs of texts, with labels; the loss of the label; accuracy and F1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.config import TrainConfig
from qat.data.datamodule import QATData
from qat.data.labelled import preview
from qat.data.labelled.build import build_labelled, further_examples
from qat.data.labelled.parts import Labelled
from qat.losses import needs, setting
from qat.losses.views import LABELS, arguments
from qat.metrics.classification import classified, own_share
from qat.metrics.classification import scores as metrics
from qat.models import hub as models
from qat.models.heads import classifier
from qat.reporting.scores import Scores
from qat.terminal.lines import say
from qat.terminal.stage import tracked
from qat.training.fit import device_of

if TYPE_CHECKING:
    from torchmetrics import MetricCollection
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

view = LABELS
PROBED = 4
"""Examples of the conversion's probe."""


def open_data(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, batches: int) -> QATData:
    """All examples, encoded; whatever is wrong with one is said before the model is loaded, and what labels there are."""
    _give_padding(tokenizer, config)
    known = models.label_names(config.model)
    _check_teacher(config, known)
    data = build_labelled(config.data, tokenizer, seed=config.seed, total_batches=batches, known=known)
    for source in config.eval.texts.values():
        further_examples(source, config.data, tokenizer, _part(data).names)
    say(*data.notes)
    if config.dry_run:
        print(*preview.lines(data, tokenizer, config.trainer.devices * config.trainer.num_nodes), sep="\n")
    return data


def _give_padding(tokenizer: PreTrainedTokenizerFast, config: TrainConfig) -> None:
    """Decoders often come without a token for padding; that of the end serves, as it is masked."""
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer of {config.model.path} has neither a padding nor an end token, so nothing can pad batches"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _check_teacher(config: TrainConfig, known: tuple[str, ...] | None) -> None:
    """Refuse a teacher whose head nobody has trained."""
    asked = needs(config.distill, "teacher")
    if asked and config.model.teacher == "shared" and known is None and not config.control.first:
        raise ValueError(
            f"{setting(config.distill, asked[0])} needs a teacher, but {config.model.path} has no trained head;"
            " set control.enabled=true control.first=true, which trains it first, model.teacher to a fine-tuned classifier,"
            " or distill=none"
        )


def _part(data: QATData | None, valid: bool = False) -> Labelled:
    assert data is not None
    part = data.valid if valid else data.train
    assert isinstance(part, Labelled)
    return part


def load_model(config: TrainConfig, data: QATData | None) -> PreTrainedModel:
    """With a head for the data's labels: the checkpoint's own where it has one, else a new one."""
    part = _part(data)
    model = models.load_model(config.model, head=classifier(part.names.names))
    text = model.config.get_text_config()
    if text.pad_token_id is None:  # decoders look for the last token that is no padding
        text.pad_token_id = model.config.pad_token_id = part.tokenizer.pad_token_id
    return model


def load_teacher(config: TrainConfig, base: PreTrainedModel) -> PreTrainedModel:
    """Another classifier of the same labels, whose head was trained.

    Raises:
        ValueError: it has no such head, other labels, or another vocabulary.
    """
    path, labels = config.model.teacher, _names(base)
    known = models.label_names(replace(config.model, path=path, revision=None))
    if known is None:
        raise ValueError(f"model.teacher={path} has no trained head for classification, so it has nothing to teach")
    if len(known) != len(labels) or (set(known) == set(labels) and known != labels):
        raise ValueError(
            f"model.teacher={path} has the labels {', '.join(known)}, the student {', '.join(labels)}, in this order"
        )
    teacher = models.load_model(config.model, path, classifier(labels))
    if teacher.config.vocab_size != base.config.vocab_size:
        found = f"{teacher.config.vocab_size} tokens in its vocabulary, but the student {base.config.vocab_size}"
        raise ValueError(f"model.teacher={path} has {found}; both read the same batches")
    teacher.config.get_text_config().pad_token_id = base.config.get_text_config().pad_token_id
    return teacher


def _names(model: Any) -> tuple[str, ...]:
    return tuple(model.config.id2label[i] for i in range(model.config.num_labels))


def ready(config: TrainConfig) -> bool:
    """Whether the checkpoint has a trained head."""
    return models.label_names(config.model) is not None


def probe(data: QATData | None, base: PreTrainedModel) -> dict[str, Any]:
    """The first training examples, as one batch."""
    part = _part(data)
    return arguments(base, part.collate([part[i] for i in range(min(PROBED, len(part)))]))


def sample(config: TrainConfig) -> dict[str, Any]:
    """Any tokens with the first label."""
    return {
        "input_ids": torch.zeros(1, config.data.sequence_length, dtype=torch.long),
        "labels": torch.zeros(1, dtype=torch.long),
    }


def scores(data: QATData) -> MetricCollection:
    """Accuracy and F1."""
    return metrics(len(_part(data).names))


@dataclass(frozen=True)
class Examples:
    """Call it with a model: accuracy of the run's own examples ('') and of further ones, and F1 of each."""

    about: dict[str, Scores]
    batches: dict[str, list[dict[str, Tensor]]]
    """Name of the examples -> their batches."""
    labels: int
    device: torch.device

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Accuracy by the examples' name, F1 by `f1` or `f1_<name>`; the model is left in eval mode on the CPU."""
        self.place(model)
        found: dict[str, float] = {}
        for name, batches in self.batches.items():
            shown = tracked(own_share(batches), f"accuracy on {self.about[name].text}", "batches")
            values = classified(model, shown, self.labels, arguments)
            found |= {name: values["accuracy"], _f1(name): values["f1"]}
        model.cpu()
        return found

    def place(self, model: Any) -> Any:
        """The model, in eval mode, on the device that measures."""
        return model.eval().to(self.device)

    def logits(self, model: nn.Module) -> Tensor:
        """Of the first batch, float32 [B, C]; the model is left in eval mode on the CPU."""
        self.place(model)
        batch = {key: value.to(self.device) for key, value in self.batches[""][0].items()}
        found: Tensor = model(**arguments(model, batch)).logits
        model.cpu()
        return found


def _f1(name: str) -> str:
    return f"f1_{name}" if name else "f1"


def measure(config: TrainConfig, data: QATData, tokenizer: PreTrainedTokenizerFast) -> Examples:
    """The validation's examples and those of eval.texts, up to eval.max_tokens tokens of each."""
    own = _part(data, valid=True)
    more = {name: further_examples(source, config.data, tokenizer, own.names) for name, source in config.eval.texts.items()}
    titles = {"": data.eval_name, **{name: name for name in more}}
    parts = {"": own, **more}
    batches = {name: part.batches(config.eval.batch_size, config.eval.max_tokens) for name, part in parts.items()}
    about: dict[str, Scores] = {}
    for name, found in batches.items():
        counts = own.names.counts(label for batch in found for label in batch["labels"].tolist())
        accuracy = Scores(titles[name], sum(counts), max(counts) / sum(counts))
        about |= {name: accuracy, _f1(name): replace(accuracy, measure="f1")}
    return Examples(about, batches, len(own.names), device_of(config.trainer))
