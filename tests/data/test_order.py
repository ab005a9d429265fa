"""Windows, splits and the order of batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qat.config import DataConfig
from qat.data import build_datamodule, text_tokens
from qat.data.order import Shuffled, StreamBatches, permutation


def test_split_windows_and_labels(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    module = build_datamodule(data, tokenizer, total_batches=3)
    everything = text_tokens(str(data.train), tokenizer, data, None)
    cut = len(everything) - int(0.2 * len(everything))
    assert torch.equal(module.eval_tokens, everything[cut:]) and module.eval_tokens.dtype == torch.int64
    assert (module.name, module.eval_name) == ("train.txt", "last 20 % of train.txt")
    assert module.train_tokens == cut // 16 * 16
    assert torch.equal(module.train[1]["input_ids"], everything[16:32])
    [*_, last] = batches = list(module.val_dataloader())
    assert last["input_ids"].dtype == last["labels"].dtype == torch.int64 and batches[0]["labels"].shape == (2, 16)
    assert torch.equal(batches[0]["labels"], batches[0]["input_ids"])


def test_text_shorter_than_a_sequence_is_refused(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    data.sequence_length = 500
    with pytest.raises(ValueError, match=r"last 20 % of train.txt has \d+ tokens, fewer than one sequence .*=500"):
        build_datamodule(data, tokenizer, total_batches=1)


def test_every_epoch_is_its_own_permutation_and_nothing_is_dropped() -> None:
    stream = [index for batch in StreamBatches(Shuffled(7, 1), 3, total_batches=7) for index in batch]  # 21 = three epochs of 7
    epochs = [stream[:7], stream[7:14], stream[14:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1] != epochs[2] and epochs[1] == permutation(7, 1, 1).tolist()
    assert stream != [index for batch in StreamBatches(Shuffled(7, 2), 3, total_batches=7) for index in batch]


def test_devices_share_a_batch_and_positions_continue() -> None:
    whole = list(StreamBatches(Shuffled(10, 3), 4, total_batches=5))
    parts = [list(StreamBatches(Shuffled(10, 3), 2, total_batches=5, rank=rank, world=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    rest = StreamBatches(Shuffled(10, 3), 4, total_batches=5, start=12)
    assert list(rest) == whole[3:] and len(rest) == 5


def test_documents_with_nothing_between_them_are_said(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    text = Path(str(data.train))
    file = text.with_suffix(".jsonl")
    file.write_text("\n".join(json.dumps({"text": line}) for line in text.read_text().splitlines()))
    assert build_datamodule(replace(data, train=str(file)), tokenizer, total_batches=1).notes == []
    tokenizer.eos_token = None
    [note] = build_datamodule(replace(data, train=str(file)), tokenizer, total_batches=1).notes
    assert note == "the tokenizer has no end-of-sequence token, so nothing stands between the documents of train.jsonl"
    assert build_datamodule(data, tokenizer, total_batches=1).notes == []  # one document
