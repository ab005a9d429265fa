"""A tiny BERT and labelled texts that it can learn, for tests of several modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerFast

WORDS = ("good", "fine", "great", "bad", "dull", "poor", "film", "plot", "the", "a", "is", "was")
ROWS = [
    (f"the {noun} {verb} {word}{' ' + tail if tail else ''}", "pos" if good else "neg")
    for noun in ("film", "plot")
    for verb in ("is", "was")
    for tail in ("", "a film", "a plot the film is")
    for word, good in (("good", 1), ("bad", 0), ("fine", 1), ("dull", 0), ("great", 1), ("poor", 0))
]
"""72 texts and their labels."""


def write_table(file: Path, rows: Sequence[Sequence[str]] = ROWS, header: Sequence[str] = ("text", "label")) -> Path:
    """A .tsv file."""
    file.write_text("\n".join("\t".join(row) for row in (header, *rows)) + "\n", encoding="utf-8")
    return file


def write_bert(folder: Path, kind: type[PreTrainedModel] = BertModel, **config: object) -> Path:
    """A random BERT of two layers with a tokenizer of whole words, as a transformers folder."""
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **special)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    more = {"num_attention_heads": 2, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, **config}
    kind(BertConfig(**{**sizes, **more})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
