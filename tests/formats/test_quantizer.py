"""transformers loads and saves our folders after `import qat`, and refuses them loudly without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZES, packed_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    pipeline,
)

import qat
from qat.conversion.layers import bitlinears, packed_layers
from qat.formats.packed import folder as packed
from qat.formats.packed.manifest import parse
from qat.formats.seal import SUMS

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.randint(1, 32, (2, 12), generator=torch.Generator().manual_seed(0))
KINDS = {
    "ternary": {},
    "channel": {"granularity": "channel"},
    "group": {"granularity": "group", "group_size": 4},
    "binary": {"weight": "binary", "granularity": "channel"},
    "float activations": {"act_bits": None},
    "absmedian": {"scale": "absmedian", "scale_dtype": "float16"},
}


@pytest.mark.parametrize("layout", ["2bit", "base3"])
@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_gives_packed_layers_of_every_kind(tmp_path: Path, kind: str, layout: str) -> None:
    model = packed_model(Qwen2Config(**SIZES), layout, **KINDS[kind])
    packed.save(model, tmp_path / "x")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    layers, before = packed_layers(again), packed_layers(model)
    assert list(layers) == list(before) and len(layers) == 14
    assert all(layers[name].config == before[name].config and layers[name].layout == layout for name in layers)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert torch.equal(packed.load(tmp_path / "x")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "3KB"])
def test_save_pretrained_round_trip(tmp_path: Path, tied: bool, shard: str) -> None:
    """Packed in memory, saved; loaded and saved again; whole and in shards: the same tensors and the same manifest."""
    model = packed_model(LlamaConfig(**SIZES, tie_word_embeddings=tied), "base3")
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "first", max_shard_size=shard)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second", max_shard_size=shard)
    assert (len(list((tmp_path / "second").glob("*.safetensors"))) > 1) is (shard == "3KB")
    for folder in ("first", "second"):
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / folder)(IDS).logits, expected)
        assert torch.equal(packed.load(tmp_path / folder)(IDS).logits, expected)
    manifests = [packed.read_config(tmp_path / folder)["quantization_config"] for folder in ("first", "second")]
    assert manifests[0] == manifests[1]
    packed.save(model, tmp_path / "third")
    tensors = [
        {name: tensor for file in (tmp_path / folder).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in ("second", "third")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_the_same_for_conv1d_and_for_encoders(tmp_path: Path) -> None:
    gpt2 = packed_model(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    bert = packed_model(
        BertConfig(**{key: SIZES[key] for key in SIZES if key != "num_key_value_heads"}), auto=AutoModelForMaskedLM
    )
    for model, auto in ((gpt2, AutoModelForCausalLM), (bert, AutoModelForMaskedLM)):
        model.save_pretrained(tmp_path / model.config.model_type)
        again = auto.from_pretrained(tmp_path / model.config.model_type)
        assert len(packed_layers(again)) == len(packed_layers(model)) > 0
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert torch.equal(packed.load(tmp_path / model.config.model_type)(IDS).logits, model(IDS).logits)


def test_auto_model_loads_the_base_of_a_causal_model(tmp_path: Path) -> None:
    model = packed_model()
    packed.save(model, tmp_path / "x")
    base = AutoModel.from_pretrained(tmp_path / "x")
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    assert "layers.0.self_attn.q_proj" in packed.read_config(tmp_path / "base")["quantization_config"]["layers"]
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert torch.equal(again(IDS).last_hidden_state, base(IDS).last_hidden_state)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"model.layers.1": "disk", "": "cpu"}])
def test_device_maps(tmp_path: Path, device_map: object) -> None:
    model = packed_model(Qwen2Config(**SIZES))
    packed.save(model, tmp_path / "x")
    if isinstance(device_map, dict) and len(device_map) > 1:
        names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
        device_map = {"model.layers.1": "disk", **dict.fromkeys(names, "cpu")}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "x", device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_bfloat16_keeps_codes_and_scales(tmp_path: Path) -> None:
    model = packed_model(Qwen2Config(**SIZES))
    packed.save(model, tmp_path / "x")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.bfloat16)
    for name, layer in packed_layers(again).items():
        assert torch.equal(layer.packed, model.get_submodule(name).packed) and layer.weight_scale.dtype == torch.float32
        assert layer.dtype == layer.weight.dtype == torch.bfloat16
    logits = again(IDS).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model.to(torch.bfloat16)(IDS).logits.float(), atol=0.05, rtol=0.05)


def test_generate_and_pipeline(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    qat.convert(model)
    qat.pack(model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    packed.save(model, tmp_path / "x", tokenizer=tokenizer)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    pipe = pipeline("text-generation", model=str(tmp_path / "x"), dtype=torch.float32, device_map="cpu")
    assert len(packed_layers(pipe.model)) == 14
    assert pipe("the cat", max_new_tokens=8, do_sample=False, return_tensors=True)[0]["generated_token_ids"] == expected


def test_loading_as_transformers_serve_does(tmp_path: Path, tiny_model: Path) -> None:
    manager = pytest.importorskip("transformers.cli.serving.model_manager")
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    qat.convert(model)
    qat.pack(model)
    packed.save(model, tmp_path / "x", tokenizer=AutoTokenizer.from_pretrained(tiny_model))
    served, tokenizer = manager.ModelManager(device="cpu").load_model_and_processor(f"{tmp_path / 'x'}@main")[:2]
    assert len(packed_layers(served)) == 14
    assert torch.equal(served(IDS).logits.float(), model(IDS).logits) and len(tokenizer) == 32


def test_unpack_and_dequantize_leave_an_ordinary_model(tmp_path: Path) -> None:
    model = packed_model()
    packed.save(model, tmp_path / "x")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    loaded.save_pretrained(tmp_path / "saved")  # which makes a string of the dtype
    for plain in (loaded.dequantize(), model):
        if plain is model:
            qat.unpack(model)
        plain.save_pretrained(tmp_path / "plain")
        assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
        assert torch.equal(again(IDS).logits, plain(IDS).logits)


def test_parts_packed_on_their_own(tmp_path: Path) -> None:
    """Packing never fails for what a folder cannot hold; saving says it, whichever way the parts were packed."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    qat.convert(model, include="*.self_attn")
    qat.pack(model.model.layers[0].self_attn)
    assert not hasattr(model.config, "quantization_config")
    qat.pack(model)
    model.save_pretrained(tmp_path / "x")
    expected = model(IDS).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "x")(IDS).logits, expected)
    layers = packed_layers(model)
    next(iter(layers.values())).config.eps = 1e-4
    with pytest.raises(ValueError, match="mixes 2 kinds of packed layers"):
        model.save_pretrained(tmp_path / "y")
    mixed = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    qat.convert(mixed.model.layers[0], qat.QuantConfig())
    qat.convert(mixed.model.layers[1], qat.QuantConfig(weight="binary", act_bits=None))
    qat.pack(mixed.model.layers[0])
    qat.pack(mixed)
    assert len(packed_layers(mixed)) == 14 and not hasattr(mixed.config, "quantization_config")
    with pytest.raises(ValueError, match="mixes 2 kinds of packed layers"):
        mixed.save_pretrained(tmp_path / "y")


def test_nothing_is_quantized_on_the_fly_or_trained(tmp_path: Path) -> None:
    from qat.formats.packed.quantizer import QatConfig

    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "plain")
    config = packed_model().config.quantization_config
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=QatConfig(**config.to_dict()))
    model = packed_model()
    assert not model.hf_quantizer.is_trainable and not list(bitlinears(model))


def test_what_would_be_random_is_refused(tmp_path: Path) -> None:
    """Plain from_pretrained, not our stricter loader."""
    model = packed_model()
    file = packed.save(model, tmp_path / "x") / "model.safetensors"
    file.with_name(SUMS).unlink()  # as of an earlier version: what the reader finds without it
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="the first is model.norm.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    torch.save(load_file(file), tmp_path / "x/pytorch_model.bin")
    file.unlink()
    with pytest.raises(ValueError, match="may be a pickle"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "x")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_imports_in_either_order(tmp_path: Path) -> None:
    model = packed_model(granularity="channel")
    packed.save(model, tmp_path / "x")
    body = f"""
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "x")!r})
print(type(model.model.layers[0].self_attn.q_proj).__name__, [f for f in sys.meta_path if "qat" in type(f).__module__])
"""
    orders = (
        "import sys, qat; from transformers import AutoModelForCausalLM",
        "import sys; from transformers import AutoModelForCausalLM; import qat",
        "import sys, transformers, qat; AutoModelForCausalLM = transformers.AutoModelForCausalLM",
    )
    for order in orders:
        done = run(order + body)
        assert done.stdout == "PackedBitLinear []\n", done.stderr


def test_transformers_without_qat_stops(tmp_path: Path) -> None:
    """It warns about the unknown quant_method and goes on; the shapes make it an error."""
    packed.save(packed_model(), tmp_path / "x")
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(tmp_path / 'x')!r})"
    done = run(code)
    assert done.returncode == 1 and "RuntimeError" in done.stderr and "qat" in done.stderr


def test_manifest_of_a_record() -> None:
    model = packed_model()
    manifest = json.loads(json.dumps(model.config.quantization_config.to_dict()))
    record, widths = parse(manifest)
    assert record.converted == list(widths) == list(packed_layers(model)) and set(widths.values()) == {32, 44}
    assert "kernels" not in manifest["quant"] and record.config == qat.QuantConfig()
