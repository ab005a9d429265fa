"""Fused layers give the packed model's numbers, the cache those of a full pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import qat
from qat import generate
from qat.config import flags as verb
from qat.formats.packed import folder as packed
from qat.inference import digits, heads
from qat.inference import tiles as inference
from qat.inference.decode import Decoder, greedy
from qat.ops import cpu


def packed_model(folder: Path, **config: object) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    qat.convert(model, qat.QuantConfig(**config))  # type: ignore[arg-type]
    qat.pack(model, layout="2bit")
    return model


@pytest.fixture
def packed_folder(tiny_model, tmp_path):
    return packed.save(packed_model(tiny_model), tmp_path / "packed", tokenizer=AutoTokenizer.from_pretrained(tiny_model))


needs_kernels = pytest.mark.skipif(not cpu.compiled(), reason=f"no compiled kernels: {cpu.status().why}")


CONFIGS: list[dict[str, object]] = [{}, {"granularity": "channel"}, {"granularity": "group", "group_size": 16}]


@needs_kernels
@pytest.mark.parametrize("config", [*CONFIGS, {"weight": "binary"}])
def test_fused_layers_equal_the_packed_ones_to_the_bit(tiny_model, config):
    if config.get("group_size"):  # 43 has no divisor: leave the layer that reads it out
        model = AutoModelForCausalLM.from_pretrained(tiny_model).eval().requires_grad_(False)
        qat.convert(model, qat.QuantConfig(**config), exclude="*.down_proj")
        qat.pack(model)
    else:
        model = packed_model(tiny_model, **config)
    ids = torch.randint(31, (1, 13))
    before = model(input_ids=ids).logits
    assert inference.tile(model) == (12 if config.get("group_size") else 14)
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("Leader") == 4 and kinds.count("Follower") == 6 and "PackedBitLinear" not in kinds
    assert torch.equal(model(input_ids=ids).logits, before)


@needs_kernels
def test_fused_layers_with_biases_and_scales_of_their_own():
    torch.manual_seed(1)
    parent = nn.Module()
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        setattr(parent, name, nn.Linear(24, 10 + i, bias=i != 1).requires_grad_(False))
        getattr(parent, name).weight.mul_(1 + i)
    qat.convert(parent)
    qat.pack(parent)
    x = torch.randn(3, 24)
    before = [getattr(parent, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    inference.tile(parent)
    assert all(torch.equal(getattr(parent, name)(x), y) for name, y in zip(("q_proj", "k_proj", "v_proj"), before, strict=True))
    parent.q_proj(x)
    assert torch.equal(parent.k_proj(2 * x), parent.k_proj((2 * x).clone()))  # another input is computed anew


@needs_kernels
def test_layers_with_a_norm_of_their_own_are_tiled_and_not_fused(tiny_model):
    model = packed_model(tiny_model, rms_norm_eps=0.01)
    for name, parameter in model.named_parameters():
        if name.endswith("rms_norm.weight"):
            parameter.normal_(1, 0.25)
    ids = torch.randint(31, (1, 13))
    before = model(input_ids=ids).logits
    assert inference.tile(model) == 14
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("TiledLinear") == kinds.count("RMSNorm") == 14 and "Leader" not in kinds
    assert torch.equal(model(input_ids=ids).logits, before) and Decoder(model, 8).native is None


def test_reference_kernels_are_left_alone(tiny_model):
    assert inference.tile(packed_model(tiny_model, kernels="reference")) == 0


def test_an_unknown_head_is_refused(tiny_model):
    with pytest.raises(ValueError, match="choose one of full, bf16, 6bit, 8bit"):
        digits.quantize_head(packed_model(tiny_model), "int3")
    assert {"full", "bf16", *digits.HEAD_DIGITS} == set(verb.HEAD_KINDS)


def test_a_head_leaves_the_tied_embedding_alone(tiny_model):
    model = packed_model(tiny_model)
    before = model.get_input_embeddings().weight.clone()
    digits.quantize_head(model, "8bit")
    assert type(model.lm_head) is digits.DigitLinear and torch.equal(model.get_input_embeddings().weight, before)


@needs_kernels
@pytest.mark.parametrize("path", cpu.paths() if cpu.compiled() else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_multiplied_in_float32(path, dtype):
    before = cpu.isa()
    cpu.select_isa(path)
    try:
        for n, k in ((1, 1), (37, 43), (64, 576)):
            weight, x = torch.randn(n, k).to(dtype), torch.randn(2, 3, k)
            found = torch.ops.qat.cpu_rows(x, weight)
            torch.testing.assert_close(found.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
    finally:
        cpu.select_isa(before)
    with pytest.raises(RuntimeError, match="x must be float32"):
        torch.ops.qat.cpu_rows(torch.randn(2, 5), torch.randn(3, 4))


@needs_kernels
@pytest.mark.parametrize("exact", [True, False])
def test_a_full_head_is_read_as_what_it_holds(tiny_model, exact):
    model, ids = packed_model(tiny_model), torch.randint(31, (1, 5))
    if exact:
        model.lm_head.weight.copy_(model.lm_head.weight.bfloat16())
    before, embedded = model(input_ids=ids).logits, model.get_input_embeddings()(ids)
    words = heads.stream_head(model)
    assert (model.lm_head.weight.dtype, "bfloat16" in words) == ((torch.bfloat16, True) if exact else (torch.float32, False))
    assert model.get_input_embeddings().weight.data_ptr() == model.lm_head.weight.data_ptr()  # tied still
    assert torch.equal(model.get_input_embeddings()(ids), embedded)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(input_ids=ids.repeat(4, 1)).logits[3:], before, rtol=1e-5, atol=1e-5)  # by torch


@needs_kernels
def test_a_head_rounded_to_bfloat16(tiny_model):
    model, x = packed_model(tiny_model), torch.randn(2, 32)
    weight = model.lm_head.weight.detach().clone()
    digits.quantize_head(model, "bf16")
    torch.testing.assert_close(model.lm_head(x), x @ weight.bfloat16().float().T, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.get_input_embeddings().weight, weight)


def test_tokens_one_by_one_equal_one_pass(tiny_model):
    model = packed_model(tiny_model)
    inference.tile(model)
    ids = torch.randint(31, (20,))
    decoder = Decoder(model, 20)
    rows = [decoder.read(ids[:7])] + [decoder.read(ids[i : i + 1]) for i in range(7, 20)]
    with torch.inference_mode():
        whole = model(input_ids=ids[None], use_cache=False).logits[0, 6:]
    torch.testing.assert_close(torch.stack(rows), whole, rtol=1e-2, atol=1e-2)


ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"attention_bias": True},
    "qwen3": {"head_dim": 24},
    "llama with scaled rope": {"rope_parameters": {**ROPE, "original_max_position_embeddings": 16}},
}


@needs_kernels
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_native_step_computes_what_transformers_computes(family, config):
    torch.manual_seed(3)
    sizes = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    settings = AutoConfig.for_model(
        family.split()[0], **sizes, num_key_value_heads=2, max_position_embeddings=64, **FAMILIES[family]
    )
    model = AutoModelForCausalLM.from_config(settings).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            parameter.normal_(1, 0.3)
    qat.convert(model, qat.QuantConfig(**config))
    qat.pack(model)
    inference.tile(model)
    ids = torch.randint(50, (20,))
    decoder, plain = Decoder(model, 20), Decoder(model, 20)
    assert decoder.native is not None
    plain.native = None
    for piece in (ids[:6], *ids[6:].split(1)):
        torch.testing.assert_close(decoder.read(piece), plain.read(piece), rtol=0.03, atol=0.03)
    for mine, theirs in zip(decoder.cache.layers, plain.cache.layers, strict=True):
        close = (mine.keys - theirs.keys).norm() / theirs.keys.norm(), (mine.values - theirs.values).norm() / theirs.values.norm()
        assert mine.length == theirs.length == 20 and max(close) < 0.01


def test_other_models_run_as_transformers_runs_them(tiny_model):
    model = packed_model(tiny_model)  # not tiled
    assert Decoder(model, 8).native is None
    inference.tile(model)
    assert (Decoder(model, 8).native is not None) == cpu.compiled()
    model.config.hidden_act = "gelu"
    assert Decoder(model, 8).native is None


def test_greedy_equals_transformers(tiny_model):
    model = packed_model(tiny_model)
    ids = torch.randint(31, (9,))
    theirs = model.generate(ids[None], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 9:]
    assert torch.equal(greedy(Decoder(model, 21), ids, 12), theirs)


def test_the_verb_streams_the_greedy_text(packed_folder, capsys):
    assert generate.main([str(packed_folder), "--prompt", "the cat", "--max-new-tokens", "9"]) == 0
    shown = capsys.readouterr()
    model, tokenizer = packed.load(packed_folder), AutoTokenizer.from_pretrained(packed_folder)
    ids = torch.tensor(tokenizer("the cat")["input_ids"])
    tokens = greedy(Decoder(model, 16), ids, 9)
    ends = (tokens == tokenizer.eos_token_id).nonzero()
    tokens = tokens[: int(ends[0])] if len(ends) else tokens
    assert shown.out == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
    assert "prefill 7 tokens" in shown.err and "tokens/s" in shown.err and "peak memory" in shown.err


def test_a_run_folder_and_full_precision_generate_too(packed_folder, tiny_model, capsys):
    for path in (packed_folder.parent, tiny_model):
        assert (
            generate.main([str(path), "--prompt", "a dog", "--max-new-tokens", "3", "--temperature", "1", "--head", "6bit"]) == 0
        )
        assert "6bit head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-p", "0"], "--top-p 0.0 is not allowed"),
        (["--temperature", "-1"], "--temperature -1.0 is not allowed"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 is not allowed"),
        (["--threads", "100000"], "--threads 100000 is not allowed; it must be from 1 to"),
        (["--temperature", "1e-310"], "--temperature 1e-310 is not allowed"),
        (["--seed", "99999999999999999999"], "--seed 99999999999999999999 is not allowed"),
        (["--prompt", "\udcff\udcfe"], "--prompt is not UTF-8"),
        (["--threads", "0"], "--threads 0 is not allowed"),
        (["--chat"], "no chat template"),
        (["--system", "x"], "--system needs --chat"),
        (["--prompt", ""], "--prompt has no tokens"),
        (["--prompt", "a" * 64], "64 tokens, but the model's context is 64"),
    ],
)
def test_user_errors_are_one_line(packed_folder, capsys, flags, message):
    arguments = [str(packed_folder), "--prompt", "a", *flags]
    assert generate.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("qat.generate:") and message in error


def test_a_model_that_is_not_there(capsys, tmp_path):
    assert generate.main([str(tmp_path / "none"), "--prompt", "a"]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err


def test_the_context_limits_what_is_generated(packed_folder, capsys):
    assert generate.main([str(packed_folder), "--prompt", "a" * 60, "--max-new-tokens", "50", "--temperature", "1"]) == 0
    assert "4 new tokens at most" in capsys.readouterr().err


def test_chat_uses_the_template(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}.{% endfor %}{% if add_generation_prompt %}so{% endif %}"
    assert tokenizer.decode(generate.prompt_ids(tokenizer, "hi", True, "be kind")).replace(" ", "") == "bekind.hi.so"
