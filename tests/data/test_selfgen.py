"""Text that the teacher samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qat.config import DataConfig, SelfgenConfig
from qat.data import build_datamodule
from qat.data.order import generator
from qat.data.selfgen import draw
from qat.inference.kvcache import buffered_cache


def tiny_llama(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=32, **sizes)).eval()


def selfgen_data(tmp_path: Path, **changes) -> DataConfig:
    settings = SelfgenConfig(**({"tokens": 90, "valid_tokens": 40, "batch_size": 4} | changes))
    return DataConfig(kind="selfgen", sequence_length=16, batch_size=2, cache_dir=str(tmp_path), selfgen=settings)


def sampled(data: DataConfig, tokenizer: PreTrainedTokenizerFast, seed: int = 0, weights: int = 0):
    teacher = tiny_llama(len(tokenizer), weights)
    return build_datamodule(data, tokenizer, teacher=teacher, seed=seed, total_batches=2, progress=False)


def test_selfgen_depends_on_the_seed_and_the_weights_only(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first = sampled(selfgen_data(tmp_path / "a"), tokenizer)
    again = sampled(selfgen_data(tmp_path / "b"), tokenizer)
    assert np.array_equal(first.train.tokens, again.train.tokens) and torch.equal(first.eval_tokens, again.eval_tokens)
    assert first.train_tokens == 96 and first.eval_tokens.shape == (48,)  # whole sequences
    assert not np.array_equal(first.train.tokens[:48], first.eval_tokens.numpy())
    for other in (
        sampled(selfgen_data(tmp_path / "a"), tokenizer, seed=1),
        sampled(selfgen_data(tmp_path / "a"), tokenizer, weights=1),
    ):
        assert not np.array_equal(first.train.tokens, other.train.tokens)
    newline = tokenizer.convert_tokens_to_ids("\n")
    assert all(window["input_ids"][0] == newline for window in first.train)


def test_selfgen_follows_the_models_distribution(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = selfgen_data(tmp_path, top_k=1, batch_size=3)
    teacher = tiny_llama(len(tokenizer))
    ids = sampled(data, tokenizer).train[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(teacher(ids[None]).logits[0].argmax(-1)[:-1], ids[1:])


def test_draw_is_the_inverse_of_the_distribution() -> None:
    logits = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().expand(20_000, 4)
    shares = torch.bincount(draw(logits, torch.rand(20_000, 1, generator=generator(0))), minlength=4) / 20_000
    assert torch.allclose(shares, torch.tensor([0.5, 0.0, 0.25, 0.25]), atol=0.02) and shares[1] == 0
    assert draw(logits[:1], torch.tensor([[0.999999]])).tolist() == [3]
    assert set(draw(logits, torch.rand(20_000, 1), top_k=1).tolist()) == {0}


def test_the_buffered_cache_gives_the_logits_of_one_pass() -> None:
    model, ids = tiny_llama(40), torch.randint(40, (3, 12), generator=generator(0))
    cache = buffered_cache(model, 12)
    with torch.no_grad():
        steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(12)]
        assert torch.allclose(torch.cat(steps, 1), model(ids).logits, atol=1e-5)


def test_selfgen_needs_a_teacher_with_enough_context(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = selfgen_data(tmp_path)
    with pytest.raises(ValueError, match="needs one; set model.teacher"):
        build_datamodule(data, tokenizer, total_batches=1)
    data.sequence_length = 64
    with pytest.raises(ValueError, match="sequence_length=64 is above the model's context of 32"):
        sampled(data, tokenizer)
