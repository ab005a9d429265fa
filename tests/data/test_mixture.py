"""Text and the teacher's samples in one stream."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qat.config import DataConfig, TrainConfig
from qat.data import build_datamodule
from qat.data.mixture import Mixture
from qat.data.opening import open_data
from qat.data.order import Windows
from qat.data.preview import lines
from tests.data.test_selfgen import tiny_llama


def mixture(share: float) -> Mixture:
    texts = np.arange(12), np.arange(100, 128)  # six sequences and fourteen
    return Mixture((Windows(texts[0], 2), Windows(texts[1], 2)), share)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.7])
def test_every_stretch_holds_the_share(share: float) -> None:
    order = mixture(share).order(seed=3)
    sampled = [order(position) >= 6 for position in range(400)]
    assert sum(sampled) == round(400 * share)
    for start in range(0, 360, 7):
        assert abs(sum(sampled[start : start + 40]) - 40 * share) <= 1


def test_each_text_has_epochs_of_its_own() -> None:
    order = mixture(0.7).order(seed=1)
    found = [order(position) for position in range(40)]  # 12 of the first text, 28 of the second: two epochs of each
    first, second = [i for i in found if i < 6], [i for i in found if i >= 6]
    assert sorted(first[:6]) == sorted(first[6:]) == list(range(6)) and first[:6] != first[6:]
    assert sorted(second[:14]) == sorted(second[14:]) == list(range(6, 20)) and second[:14] != second[14:]
    again = mixture(0.7).order(seed=1)
    assert [again(position) for position in (39, 0, 17)] == [found[39], found[0], found[17]]  # a function of the position
    assert [mixture(0.7).order(seed=2)(position) for position in range(40)] != found
    assert mixture(0.7)[7]["input_ids"].tolist() == [102, 103] and mixture(0.7)[1]["labels"].tolist() == [2, 3]


def test_a_mixed_run_reads_both_and_validates_on_text(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    mixed = replace(data, kind="mixed", selfgen=replace(data.selfgen, tokens=64, share=0.25), cache_dir=str(tmp_path))
    teacher = tiny_llama(len(tokenizer))
    module = build_datamodule(mixed, tokenizer, teacher=teacher, total_batches=4, progress=False)
    plain = build_datamodule(data, tokenizer, total_batches=4)
    assert isinstance(module.train, Mixture)
    assert (module.name, module.eval_name) == ("train.txt and 25 % self-generated", "last 20 % of train.txt")
    assert np.array_equal(module.eval_tokens, plain.eval_tokens)
    assert module.train_tokens == plain.train_tokens + 64
    [epochs] = [line for line in lines(module, tokenizer) if line.startswith("epochs")]
    count = 4 * mixed.batch_size
    text, samples = (count - count // 4) / len(plain.train), (count // 4) / 4
    assert epochs == f"epochs          {text:.2f} of the text, {samples:.2f} of what was sampled: {count} sequences in all"
    batches = [batch["input_ids"] for batch in module.train_dataloader()]
    order = module.order()
    assert [len(batch) for batch in batches] == [mixed.batch_size] * 4
    assert batches[1][0].tolist() == module.train[order(mixed.batch_size)]["input_ids"].tolist()


def test_text_that_is_wrong_is_said_before_anything_is_sampled(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    config = TrainConfig(data=replace(data, kind="mixed", train="there-is-none.txt"))
    with pytest.raises(ValueError, match="there-is-none.txt"):
        open_data(config, tokenizer, 1)
    assert open_data(TrainConfig(data=replace(data, kind="mixed")), tokenizer, 1) is None
