"""A checkpoint and the model that is made of it: what either has alone is refused or named, in whatever files it lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import write_gguf
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import qat
from qat.config import ModelConfig
from qat.formats.bitnet import writing as hf
from qat.models import checkpoint
from qat.models.hub import load_model, source_dtypes

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
IDS = torch.arange(8)[None]


def save(folder: Path, dtype: torch.dtype = torch.float32, form: str = "safetensors", **settings: Any) -> LlamaForCausalLM:
    """A tiny Llama with random biases, in one of the forms that transformers reads."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **settings})).eval().to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if form.startswith("sharded") else {}))
    if form.endswith("bin"):
        to_pickle(folder)
    return model


def to_pickle(folder: Path) -> None:
    """The same weights as older transformers wrote them."""
    for file in folder.glob("*.safetensors"):
        torch.save(load_file(file), folder / file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin"))
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def edit(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Add, replace or (None) take out tensors; `__` stands for a dot."""
    file = folder / "model.safetensors"
    changed = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file, {"format": "pt"})


def load(folder: Path) -> Any:
    return load_model(ModelConfig(path=str(folder)))


def same(one: Any, two: Any) -> None:
    """Every weight, in float32. Outputs would differ by the rotary frequencies, which `two.bfloat16()` has rounded."""
    first, second = one.state_dict(), two.state_dict()
    assert all(torch.equal(first[name], second[name].float()) for name in first.keys() | second.keys())


FORMS = ("safetensors", "sharded", "bin", "sharded bin")


@pytest.mark.parametrize("form", FORMS)
def test_dropped_biases_are_refused_in_every_form(tmp_path: Path, form: str) -> None:
    model = save(tmp_path, form=form, attention_bias=True)
    assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)
    edit(tmp_path, attention_bias=False)
    with pytest.raises(ValueError, match=r"holds 8 tensors \(model.layers.0.self_attn.k_proj.bias, .* Llama.* has no place"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("saved", "said", "message"),
    [
        ({"mlp_bias": True}, {"mlp_bias": False}, r"6 tensors \(model.layers.0.mlp.down_proj.bias"),
        ({}, {"num_hidden_layers": 1}, r"9 tensors \(model.layers.1.input_layernorm.weight"),
        ({}, {"num_hidden_layers": 3}, r"no weights for 9 parameters .*: model.layers.2.input_layernorm.weight"),
        ({}, {"attention_bias": True}, r"no weights for 8 parameters .*: model.layers.0.self_attn.k_proj.bias"),
        (
            {},
            {"vocab_size": 39},
            r"lm_head.weight is \[40, 32\] in the file, but .* asks for \[39, 32\], and 1 more differ",
        ),
        ({}, {"intermediate_size": 65}, r"down_proj.weight is \[32, 64\] in the file, but config.json asks for \[32, 65\]"),
        ({}, {"num_key_value_heads": 2}, r"k_proj.weight is \[16, 32\] in the file"),
        ({}, {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}, "no weights for 4 parameters"),
        ({}, {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, but the weights are 21 tensors"),
        ({}, {"vocab_size": 10**12}, "vocab_size=1000000000000, but no weight is longer than 64"),
        ({}, {"max_position_embeddings": "many"}, "max_position_embeddings"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path: Path, saved: dict, said: dict, message: str) -> None:
    save(tmp_path, **saved)
    edit(tmp_path, **said)
    with pytest.raises(ValueError, match=message) as error:
        qat.models.hub.check_context(load(tmp_path), 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "model__layers__0__self_attn__q_norm__weight",
        "model__layers__0__self_attn__q_proj__weight_scale",
        "model__embed_positions__weight",
        "model__norm__bias",
        "score__weight",
        "model__visual__blocks__0__weight",
        "mtp__layers__0__weight",
    ],
)
def test_whatever_has_no_place_is_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path, tie_word_embeddings=True)
    change(tmp_path, **{name: torch.ones(32)})
    with pytest.raises(ValueError, match=f"holds the tensor {name.replace('__', '.')} for which LlamaForCausalLM has no place"):
        load(tmp_path)


def test_buffers_that_every_model_computes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path)
    mask = {
        "model__layers__0__self_attn__bias": torch.ones(1, 1, 8, 8),
        "model__layers__0__self_attn__masked_bias": torch.ones(1),
    }
    change(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8), **mask)
    assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "has no use for 3 tensors (model.layers.0.self_attn.bias, " in said


def test_what_the_architecture_ignores_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        **SIZES, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, layer_types=["full_attention"] * 2
    )
    Qwen3NextForCausalLM(config).save_pretrained(tmp_path)
    change(tmp_path, mtp__fc__weight=torch.ones(3, 3))
    load(tmp_path)
    assert "Qwen3NextForCausalLM has no use for the tensor mtp.fc.weight of the file\n" in capsys.readouterr().err


def test_a_bias_is_refused_though_the_class_would_ignore_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, attention_bias=True)
    edit(tmp_path, attention_bias=False)
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"proj\.bias"])
    with pytest.raises(ValueError, match="holds 8 tensors"):
        load(tmp_path)


def test_a_weight_is_missed_though_the_class_would_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    change(tmp_path, lm_head__weight=None)
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"lm_head\.weight"])
    with pytest.raises(ValueError, match="no weights for 1 parameters of a causal language model: lm_head.weight"):
        load(tmp_path)


def test_a_head_that_differs_is_not_tied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path)
    edit(tmp_path, tie_word_embeddings=True)
    found = load(tmp_path)
    assert torch.equal(found(IDS).logits, model(IDS).logits) and not found.config.tie_word_embeddings
    assert (
        "lm_head.weight and model.embed_tokens.weight, tied by its config, differ in the file: kept apart"
        in capsys.readouterr().err
    )


def test_a_shard_beside_the_index_is_refused(tmp_path: Path) -> None:
    save(tmp_path, form="sharded")
    first = sorted(tmp_path.glob("model-00001-of-*"))[0]
    stray = first.with_name(first.name.replace("00001", "00077"))
    stray.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=f"{stray.name} is a part of the weights that the index does not name"):
        load(tmp_path)


def test_an_adapter_and_integers_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    change(tmp_path, model__layers__1__mlp__up_proj__weight=torch.ones(64, 32, dtype=torch.int8))
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight is stored as int8: the checkpoint is quantized"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        load(tmp_path)


def test_a_gguf_file_with_biases_is_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "with", attention_bias=True)
    write_gguf(tmp_path / "x.gguf", model, gguf.GGMLQuantizationType.F16)
    with pytest.raises(ValueError, match=r"8 tensors \(.*bias"):
        load(tmp_path / "x.gguf")


@pytest.mark.parametrize("form", FORMS)
def test_the_dtype_of_each_weight_is_noted(tmp_path: Path, form: str) -> None:
    model = save(tmp_path, torch.bfloat16, form=form)
    found = load(tmp_path)
    assert {p.dtype for p in found.parameters()} == {torch.float32} and source_dtypes(model) == source_dtypes(found)
    qat.convert(found)
    assert set(source_dtypes(found).values()) == {torch.bfloat16}


def test_mixed_dtypes_are_noted_one_by_one(tmp_path: Path) -> None:
    save(tmp_path, torch.float16)
    change(tmp_path, model__norm__weight=torch.ones(32), model__layers__0__mlp__up_proj__weight=torch.ones(64, 32).bfloat16())
    found = source_dtypes(load(tmp_path))
    assert found["model.norm.weight"] == torch.float32 and found["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert found["model.layers.1.mlp.up_proj.weight"] == found["lm_head.weight"] == torch.float16


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)),
        (GPTNeoXForCausalLM, GPTNeoXConfig(**{key: value for key, value in SIZES.items() if key != "num_key_value_heads"})),
        (MistralForCausalLM, MistralConfig(**SIZES, tie_word_embeddings=True)),
    ],
)
def test_renamed_and_merged_tensors_have_their_place(tmp_path: Path, kind: Any, config: Any) -> None:
    torch.manual_seed(0)
    model = kind(config).eval()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    found = load(tmp_path)
    names = checkpoint.targets(found, checkpoint.stored(str(tmp_path)))
    assert {one for ours in names.values() for one in ours} <= set(found.state_dict())
    assert set(source_dtypes(found).values()) == {torch.bfloat16}
    same(found, model)


# bitnet checkpoints


def test_master_weights_are_plain_weights(tmp_path: Path) -> None:
    model = save(tmp_path, torch.bfloat16)
    edit(tmp_path, quantization_config={"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"})
    found = load(tmp_path)
    same(found, model)
    assert type(found.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not hasattr(found.config, "quantization_config") and set(source_dtypes(found).values()) == {torch.bfloat16}


@pytest.mark.parametrize("linear_class", hf.LINEAR_CLASSES)
def test_packed_weights_become_masters_that_convert_to_the_same_model(tmp_path: Path, linear_class: str) -> None:
    model = save(tmp_path / "source")
    qat.convert(model)
    expected = model(IDS).logits
    qat.pack(model)
    hf.save(model, tmp_path / "packed", linear_class=linear_class)
    found = load(tmp_path / "packed")
    assert type(found.model.layers[0].mlp.up_proj) is torch.nn.Linear
    qat.convert(found)
    torch.testing.assert_close(found(IDS).logits, expected, atol=2e-3, rtol=2e-3)


def test_a_bitnet_folder_without_scales_or_with_norms_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    edit(tmp_path, quantization_config={"quant_method": "bitnet"})
    with pytest.raises(ValueError, match=f"cannot load the model {tmp_path}: .*no tensor .*weight_scale"):
        load(tmp_path)
    edit(tmp_path, quantization_config={"quant_method": "bitnet", "use_rms_norm": True})
    with pytest.raises(ValueError, match="norms of their own"):
        load(tmp_path)
