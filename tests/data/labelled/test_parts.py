"""Batches of labelled examples: what a model is given, which examples are side by side, and how a run finds its place again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from labelled import ROWS, write_bert, write_table
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qat.config import DataConfig
from qat.data.labelled import Labelled
from qat.data.labelled.buckets import Buckets
from qat.data.labelled.build import build_labelled
from qat.data.order import STEP_TOKENS, Shuffled


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(write_bert(tmp_path_factory.mktemp("bert")))


def data(folder: Path, **more: object) -> DataConfig:
    settings = {"train": str(write_table(folder / "train.tsv")), "valid_fraction": 0.25, "sequence_length": 12, "batch_size": 4}
    return DataConfig(**{**settings, **more})  # type: ignore[arg-type]


def test_a_batch_is_padded_to_its_own_longest(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    made = build_labelled(data(tmp_path), tokenizer, seed=0, total_batches=1)
    part = made.train
    assert isinstance(part, Labelled)
    short = [part[i] for i in range(len(part)) if part.size(i) == 6][:2]
    batch = part.collate(short)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 8) and batch["labels"].shape == (2,)
    assert batch["attention_mask"].sum(1).tolist() == [6, 6] and batch["input_ids"][:, 6:].eq(0).all()
    assert batch["token_type_ids"].eq(0).all() and batch["input_ids"].dtype == torch.int64


def test_long_texts_are_cut_and_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    made = build_labelled(data(tmp_path, sequence_length=7), tokenizer, seed=0, total_batches=1)
    part = made.train
    assert isinstance(part, Labelled) and max(map(part.size, range(len(part)))) == 7
    assert f"{part.truncated} training texts cut to 7 tokens" in made.notes and part.truncated > 0
    assert part.collate([part[0]])["input_ids"].shape[1] <= 7


def test_pairs_have_two_token_types(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [(text, text, label) for text, label in ROWS]
    file = write_table(tmp_path / "pairs.tsv", rows, ("text", "other", "label"))
    made = build_labelled(data(tmp_path, train=str(file), pair_field="other"), tokenizer, seed=0, total_batches=1)
    assert set(made.train[0]["token_type_ids"]) == {0, 1}


def test_what_is_held_out_is_the_same_for_every_seed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first, second = (build_labelled(data(tmp_path), tokenizer, seed=seed, total_batches=1) for seed in (0, 1))
    assert (len(first.train), len(first.valid)) == (54, 18)
    assert first.valid.tokens().tolist() == second.valid.tokens().tolist()
    assert first.eval_name == "25 % of train.tsv" and len(set(first.valid.labels)) == 2  # type: ignore[union-attr]
    assert first.notes[0].startswith("labels of train.tsv: neg ")


def test_an_unknown_label_of_the_validation_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    valid = write_table(tmp_path / "valid.tsv", [("the film is good", "neutral")])
    with pytest.raises(ValueError, match="valid.tsv:2: the label 'neutral' is none of those that are learned: 'neg', 'pos'"):
        build_labelled(data(tmp_path, valid=str(valid)), tokenizer, seed=0, total_batches=1)


def test_buckets_hold_each_sequence_once_an_epoch_and_batches_of_like_length() -> None:
    sizes = [(7 * i) % 31 for i in range(64)]
    order = Buckets(Shuffled(64, 3), sizes.__getitem__, block=4, bucket=32, seed=3)
    stream = [order(position) for position in range(128)]
    assert Counter(stream) == dict.fromkeys(range(64), 2)
    batches = [[sizes[i] for i in stream[start : start + 4]] for start in range(0, 128, 4)]
    assert max(max(one) - min(one) for one in batches) <= 12 and sum(max(one) - min(one) for one in batches) / 32 < 5
    assert [order(position) for position in (70, 5, 127)] == [stream[i] for i in (70, 5, 127)]
    assert [sum(one) for one in batches[:8]] != sorted(sum(one) for one in batches[:8])


def test_a_step_s_labels_are_counted_over_its_batches(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    made = build_labelled(data(tmp_path, bucket=16), tokenizer, seed=0, total_batches=5)
    batches = list(made.train_dataloader())
    assert len(batches) == 5 and all(batch[STEP_TOKENS] == 4 for batch in batches)


def test_evaluation_takes_the_first_examples_within_a_count_of_tokens(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    part = build_labelled(data(tmp_path), tokenizer, seed=0, total_batches=1).train
    assert isinstance(part, Labelled)
    two = part.size(0) + part.size(1)
    assert [len(batch["labels"]) for batch in part.batches(8, two)] == [2]
    assert sum(len(batch["labels"]) for batch in part.batches(8)) == len(part)
    assert len(part.batches(8, 1)) == 1
