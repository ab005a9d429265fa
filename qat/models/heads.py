"""What lies upon a pretrained base model: the head of its own pretraining, or one that is new.

A language model brings its head along, so whatever its checkpoint lacks is damage. A classifier's is new wherever the checkpoint
was not fine-tuned for classification, and the head of its pretraining (`lm_head`, `cls.predictions`) has no use there. Below the
head nothing may be missing or left over, the pooler excepted, which masked language models do not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CLASSIFIER = "ForSequenceClassification"
"""How transformers ends the names of such classes."""
_POOLER = ("pooler",)


@dataclass(frozen=True)
class Head:
    """`loader`: the class of transformers that builds base model and head; `labels`: in their order, of a classifier."""

    loader: str
    words: str
    labels: tuple[str, ...] = ()

    def auto(self) -> Any:
        """transformers' class."""
        import transformers

        return getattr(transformers, self.loader)

    def arguments(self) -> dict[str, Any]:
        """What its from_pretrained is told: the labels' names, which decide the head's width."""
        if not self.labels:
            return {}
        numbers = dict(enumerate(self.labels))
        return {"num_labels": len(numbers), "id2label": numbers, "label2id": {name: i for i, name in numbers.items()}}

    def may_be_new(self, model: Any, name: str) -> bool:
        """Whether a parameter that the checkpoint lacks is the new head's."""
        below = name.startswith(f"{model.base_model_prefix}.") and not any(part in _POOLER for part in name.split("."))
        return bool(self.labels) and not below

    def is_another(self, model: Any, name: str) -> bool:
        """Whether a tensor of the file belongs to a head that this model does not have: to no part of the base model."""
        if not self.labels:
            return False
        parts = {part for part, _ in model.base_model.named_children()} | {model.base_model_prefix}
        return name.partition(".")[0] not in parts

    def refuse_source(self, source: str) -> None:
        """Raise ValueError for a file that can only be a language model."""
        if self.labels and source.endswith((".npz", ".gguf")):
            raise ValueError(f"{source} is a language model's file; for task=classification give a folder or a hub id")

    def refuse_quantized(self, source: str) -> None:
        """Raise ValueError where master weights are wanted of a quantized checkpoint, which only language models have."""
        if self.labels:
            raise ValueError(f"{source} is already quantized; for task=classification give the full-precision checkpoint")


def refuse_classifier(model: Any, path: str) -> None:
    """Raise ValueError for a model that gives labels, where text is asked of it."""
    if type(model).__name__.endswith(CLASSIFIER):
        raise ValueError(
            f"{path} is a classifier ({type(model).__name__}), which predicts labels and no text; its accuracy is in its run's"
            " result.json, and transformers' AutoModelForSequenceClassification loads its packed folder"
        )


LANGUAGE = Head("AutoModelForCausalLM", "causal language model")


def classifier(labels: tuple[str, ...]) -> Head:
    """A head for classification into labels."""
    return Head(f"AutoModel{CLASSIFIER}", "head for classification", labels)
