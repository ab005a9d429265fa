"""What a model is trained for: the table of tasks, as records that say what each reads, loads, measures and can be written as.

The records are data, below the configuration, so that its keys, reports and the main job ask one and the same row; the code of a
task lies in `qat.training.tasks`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One task. `module` has the functions of `qat.training.tasks.Code`."""

    module: str
    words: str
    """What is learned."""
    kinds: tuple[str, ...]
    """The values of data.kind that it reads."""
    files: tuple[str, ...]
    """Suffixes of the files that it reads."""
    measure: str
    """What is reported of each stage of a run."""
    rises: bool
    """A better model has more of it."""
    unit: str
    """How a value is written for people."""
    whole: bool
    """Every sequence has data.sequence_length tokens, padding included."""
    generates: bool
    """The model writes text, which is shown at validations."""
    unread: str | None = None
    """Why the stock readers of all formats but our own folder cannot take it; None where they can."""
    unused: tuple[str, ...] = ()
    """Keys of the configuration that mean nothing to it; one that is set is refused."""


TASKS: dict[str, Task] = {
    "language": Task(
        "qat.training.tasks.language",
        "the next token of text or chats",
        kinds=("text", "chat", "selfgen", "mixed"),
        files=(".txt", ".jsonl", ".parquet"),
        measure="perplexity",
        rises=False,
        unit=".3f",
        whole=True,
        generates=True,
        unused=("data.pair_field", "data.label_field", "data.bucket"),
    ),
    "classification": Task(
        "qat.training.tasks.classification",
        "the label of a text, or of a pair of texts",
        kinds=("text",),
        files=(".tsv", ".csv", ".jsonl", ".parquet"),
        measure="accuracy",
        rises=True,
        unit=".2%",
        whole=False,
        generates=False,
        unread="its stock reader takes causal language models, and this is a classifier",
        unused=(
            "eval.context",
            "eval.stride",
            "data.messages_field",
            "trainer.samples",
            "distill.kl_chunk",
            "model.start",
            "quant.budget_bits",
        ),
    ),
}
