"""From a DataConfig to a QATData of labelled examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qat.config import DataConfig
from qat.data.datamodule import QATData
from qat.data.labelled.names import Labels
from qat.data.labelled.parts import Labelled
from qat.data.labelled.reading import Example, read_examples
from qat.data.order import generator
from qat.data.sources import Source
from qat.terminal.stage import stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build_labelled(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int, total_batches: int, known: tuple[str, ...] | None = None
) -> QATData:
    """Read and encode what `data` asks for.

    Args:
        known: the labels that the model's head was trained for, in their order; None: those of the training examples.

    Raises:
        ValueError: a missing, empty or unreadable source, a field that is missing, fewer than two labels, or a label of the
            validation that training does not have.
    """
    source = _source(data)
    with stage(f"reading {source.title}"):
        train, valid, held_out = _parts(data, source)
        labels = Labels.of(train, source.title) if known is None else Labels.in_order(known, train, source.title)
        parts = [Labelled(examples, labels, tokenizer, data.sequence_length) for examples in (train, valid)]
    if data.max_tokens is not None:
        parts[0].cut(data.max_tokens)
    names = source.title, held_out
    notes = [f"labels of {name}: {labels.words(part.labels)}" for name, part in zip(names, parts, strict=True)]
    return QATData(data, (parts[0], parts[1]), names, seed=seed, total_batches=total_batches, notes=notes)


def further_examples(source: str, data: DataConfig, tokenizer: PreTrainedTokenizerFast, labels: Labels) -> Labelled:
    """Examples to evaluate on beside the validation's; a file or a hub data set of the same fields and labels."""
    place = Source(source, data.text_field, data.valid_split, data.subset)
    return Labelled(read_examples(place, data), labels, tokenizer, data.sequence_length)


def _source(data: DataConfig) -> Source:
    if not data.train:
        raise ValueError("data.train is missing; give a .tsv, .csv, .jsonl or .parquet file or the name of a hub data set")
    return Source(data.train, data.text_field, data.train_split, data.subset)


def _parts(data: DataConfig, source: Source) -> tuple[Sequence[Example], Sequence[Example], str]:
    """Training's and validation's examples, and the latter's name.

    Without data.valid a random share is held out, the same for every seed of a run: files are often sorted by label.
    """
    train = read_examples(source, data)
    if data.valid is not None:
        place = Source(data.valid, data.text_field, data.valid_split, data.subset)
        return train, read_examples(place, data), place.title
    count = max(1, int(len(train) * data.valid_fraction))
    if count >= len(train):
        raise ValueError(f"data: {source.title} has {len(train)} examples, too few to hold out {count}; give data.valid")
    order = torch.randperm(len(train), generator=generator(0, 2)).tolist()
    held_out, kept = sorted(order[:count]), sorted(order[count:])
    return [train[i] for i in kept], [train[i] for i in held_out], f"{100 * data.valid_fraction:g} % of {source.title}"
