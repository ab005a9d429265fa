"""The stock transformers folder: what it cannot hold, what transformers itself reads from it, planted faults."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from folder_samples import IDS, SMALL, WINDOWS, Q, normed_model, packed_model, qwen2, rewrite
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

import qat
from qat.formats import get_format
from qat.formats.bitnet import read_back as verification
from qat.formats.bitnet import writing as hf
from qat.formats.bitnet.tensors import pack_rows


@pytest.fixture(autouse=True)
def _no_dynamo() -> Iterator[None]:
    """transformers compiles its bitnet unpacking otherwise: 19 s at the first call on a CPU."""
    with torch._dynamo.config.patch(disable=True):
        yield


@pytest.fixture(scope="module")
def qwen():
    return packed_model(qwen2())[0]


@pytest.fixture
def in_process(monkeypatch):
    """Answer verification's question in this process: the same script, a second faster."""
    spec = importlib.util.spec_from_file_location("stock_reader", verification.READER.script)
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    reader.sys = SimpleNamespace(exit=sys.exit, modules={})

    def ask(folder, write, read):
        asked, answered = folder.parent / "request", folder.parent / "result"
        write(asked)
        reader.main(str(folder), asked, answered)
        return read(answered)

    monkeypatch.setattr(verification, "READER", SimpleNamespace(ask=ask))


def verify(folder, model):
    return hf.read_back(folder, model, IDS[:64][None], WINDOWS, bfloat16=False)


def test_pack_rows_is_the_stock_packing():
    from transformers.integrations.bitnet import pack_weights

    codes = torch.randint(-1, 2, (12, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    assert torch.equal(pack_rows(codes), pack_weights(codes.clone()))  # the stock one changes its argument


@pytest.mark.parametrize(
    ("quant", "reason"),
    [
        ({"weight": "binary"}, "ternary weights only"),
        ({"granularity": "channel"}, "one scale a tensor"),
        ({"act_bits": None}, "act_bits=null"),
        ({"act_granularity": "tensor"}, "act_granularity=tensor"),
        ({"eps": 1e-6}, "quant.eps"),
    ],
)
def test_unsupported_quantization(tmp_path, quant, reason):
    model, _ = packed_model(**quant)
    assert reason in hf.unsupported(model)
    with pytest.raises(ValueError, match="hf format cannot hold"):
        hf.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_unsupported_models(llama):
    gpt2, _ = packed_model(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    assert "Conv1D" in hf.unsupported(gpt2)
    odd, _ = packed_model(LlamaConfig(**{**SMALL, "hidden_size": 30, "num_attention_heads": 2, "head_dim": 8}))
    assert "o_proj has out_features=30" in hf.unsupported(odd)
    plain = nn.Sequential(nn.Linear(8, 8))
    assert "no quantized layers" in hf.unsupported(plain)
    qat.convert(plain)
    assert "no transformers config" in hf.unsupported(plain)
    assert hf.unsupported(llama) is None


@pytest.mark.parametrize("linear_class", hf.LINEAR_CLASSES)
def test_stock_layers_norm_their_input(tmp_path, in_process, linear_class):
    model, _ = normed_model()
    assert hf.unsupported(model) is None
    hf.save(model, tmp_path / "x", linear_class=linear_class)
    said = json.loads((tmp_path / "x/config.json").read_text())["quantization_config"]
    assert said["use_rms_norm"] is True and said["rms_norm_eps"] == 0.01
    assert verify(tmp_path / "x", model)["layers_difference"] < 1e-6
    rewrite(tmp_path / "x/model.safetensors", lambda t: t[f"{Q}.rms_norm.weight"][:8].mul_(2))
    with pytest.raises(ValueError, match="not the model that was packed: .*layers differ by"):
        verify(tmp_path / "x", model)


def test_norms_that_the_format_cannot_hold():
    assert "padding would change the mean that the norms" in hf.unsupported(normed_model(43)[0])
    model, _ = normed_model()
    qwen, _ = packed_model(qwen2(intermediate_size=44))
    model.model.layers[1].mlp.up_proj = qwen.model.layers[1].mlp.up_proj
    assert f"{Q} has rms_norm_eps=0.01 and model.layers.1.mlp.up_proj has None" in hf.unsupported(model)


def test_gguf_has_no_place_for_a_layer_s_norm():
    pytest.importorskip("gguf")
    reason = get_format("gguf").unsupported(normed_model()[0])
    assert reason == f"qwen2 in llama.cpp has no place for {Q}.rms_norm, the norm of this layer's own input"


def test_a_norm_outside_of_a_layer_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    attention = model.model.layers[0].self_attn
    attention.o_proj = nn.Sequential(nn.RMSNorm(32), attention.o_proj)
    qat.convert(model)
    qat.pack(model)
    assert "self_attn.o_proj.1 is missing in stock LlamaForCausalLM" in hf.unsupported(model)


def test_what_is_not_packed_yet_is_supported_but_not_saved(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    qat.convert(model)
    assert hf.unsupported(model) is None
    with pytest.raises(ValueError, match="call qat.pack first"):
        hf.save(model, tmp_path / "x")


def test_stock_subprocess_reads_padded_tied_llama(tmp_path, llama):
    card = {"base_model": "me/base", "license": "mit", "recipe": "quickstart", "results": {"full precision": 4.9}}
    info = hf.save(llama, tmp_path / "x", card=card, check=lambda new: hf.read_back(new, llama, IDS[:64][None], WINDOWS))
    found = info["verification"]
    assert found["layers_difference"] < 1e-6 and found["logits_difference"] < 5e-3 and found["perplexity_difference"] < 1e-4
    assert found["perplexity_bfloat16"] == pytest.approx(found["perplexity"], rel=0.02) and not found["bfloat16_cast"]
    config = json.loads((tmp_path / "x/config.json").read_text())
    assert config["dtype"] == "float32" and config["intermediate_size"] == 44 and "from 43 to 44" in info["padding"]
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    readme = (tmp_path / "x/README.md").read_text()
    assert readme.startswith("---\nbase_model: me/base\n") and "| full precision | 4.9 |" in readme
    assert "from 43 to 44" in readme and "\nlicense: mit\n" in readme
    assert llama.config.intermediate_size == 43 and llama.config.quantization_config.quant_method == "qat"


def test_stock_subprocess_reads_qwen2_with_biases_as_autobitlinear(tmp_path, qwen):
    hf.save(qwen, tmp_path / "x", linear_class="autobitlinear")
    found = hf.read_back(tmp_path / "x", qwen, IDS[:64][None], WINDOWS)
    assert found["layers_difference"] < 1e-6 and found["logits_difference"] < 5e-3 and found["perplexity_difference"] < 1e-4
    assert found["bfloat16_cast"] == 1


def test_qwen2_with_biases_as_bitlinear(tmp_path, qwen, in_process):
    hf.save(qwen, tmp_path / "x")
    found = verify(tmp_path / "x", qwen)
    assert found["layers_difference"] < 1e-6 and found["perplexity_difference"] < 1e-4


def test_excluded_layers_and_rounded_scale(tmp_path, in_process):
    """An excluded gate_proj must be padded as well, and names must match no more than themselves."""
    names = ["model.layers.1.mlp.gate_proj", "*.0.self_attn.k_proj"]
    model, _ = packed_model(qwen2(), exclude=names, scale_dtype="bfloat16")
    hf.save(model, tmp_path / "x")
    kept = json.loads((tmp_path / "x/config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert sorted(kept) == ["lm_head", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.gate_proj"]
    assert load_file(tmp_path / "x/model.safetensors")["model.layers.1.mlp.gate_proj.weight"].shape == (44, 32)
    assert verify(tmp_path / "x", model)["layers_difference"] < 1e-6


def invert_scale(tensors):
    tensors[f"{Q}.weight_scale"] = 1 / tensors[f"{Q}.weight_scale"]


def permute_rows(tensors):
    tensors[f"{Q}.weight"][[0, 1]] = tensors[f"{Q}.weight"][[1, 0]]


def scale_bias(tensors):
    tensors[f"{Q}.bias"] *= tensors[f"{Q}.weight_scale"]


def flip_one_code(tensors):
    tensors[f"{Q}.weight"][0, 0] ^= 1


@pytest.mark.parametrize("fault", [invert_scale, permute_rows, scale_bias, flip_one_code])
def test_planted_faults_are_found(tmp_path, qwen, in_process, fault):
    hf.save(qwen, tmp_path / "x", linear_class="autobitlinear")
    rewrite(tmp_path / "x/model.safetensors", fault)
    with pytest.raises(ValueError, match="not the model that was packed: .*layers differ by"):
        verify(tmp_path / "x", qwen)


def test_a_failed_check_leaves_no_folder(tmp_path, llama):
    def fail(folder):
        assert (folder / "config.json").exists()
        raise ValueError("differs")

    with pytest.raises(ValueError, match="differs"):
        hf.save(llama, tmp_path / "x", check=fail)
    assert list(tmp_path.iterdir()) == []
