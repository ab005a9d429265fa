"""Stock bitnet checkpoints of both conventions, made by transformers' own code, against its own layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file, save_file
from tiny import SIZES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitNetConfig, LlamaConfig, Qwen2Config
from transformers.integrations.bitnet import pack_weights

import qat
from qat.conversion.layers import bitlinears, packed_layers
from qat.formats.bitnet import reading as bitnet
from qat.formats.bitnet import writing as hf

IDS = torch.randint(1, 32, (2, 12), generator=torch.Generator().manual_seed(0))
TINY = {**SIZES, "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# As the published checkpoints say it: microsoft/bitnet-b1.58-2B-4T, Falcon-E, onebitllms (with biases, to see their scaling).
PEERS = {
    "bitnet-b1.58-2B-4T": (BitNetConfig, {"linear_class": "autobitlinear", "quantization_mode": "offline"}, torch.bfloat16),
    "Falcon-E": (LlamaConfig, {"modules_to_not_convert": ["lm_head"]}, torch.bfloat16),
    "onebitllms": (Qwen2Config, {"linear_class": "bitlinear", "modules_to_not_convert": ["lm_head"]}, torch.float32),
    "with biases": (Qwen2Config, {"linear_class": "autobitlinear", "quantization_mode": "offline"}, torch.float32),
    "with norms": (Qwen2Config, {"use_rms_norm": True, "rms_norm_eps": 0.01}, torch.float32),
    "with norms, autobitlinear": (
        Qwen2Config,
        {"linear_class": "autobitlinear", "quantization_mode": "offline", "use_rms_norm": True},  # eps is the stock default
        torch.bfloat16,
    ),
}


@pytest.fixture(autouse=True)
def _no_dynamo() -> Iterator[None]:
    with torch._dynamo.config.patch(disable=True):
        yield


def checkpoint(folder: Path, peer: str) -> Path:
    """A small random checkpoint in the peer's own format: `pack_weights`, its dtype, its convention, its config keys."""
    kind, said, dtype = PEERS[peer]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**TINY, tie_word_embeddings=peer == "bitnet-b1.58-2B-4T"))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    for name, tensor in list(tensors.items()):
        if tensor.ndim == 2 and "layers" in name:
            inverse = 1 / tensor.float().abs().mean()
            codes = (tensor.float() * inverse).round().clamp(-1, 1)
            scale = 1 / inverse if said.get("linear_class") == "autobitlinear" else inverse
            tensors[name] = pack_weights(codes.clone())
            tensors[f"{name}_scale"] = scale.reshape(1).to(dtype)
            if said.get("use_rms_norm"):
                tensors[f"{name.removesuffix('.weight')}.rms_norm.weight"] = (1 + torch.randn(codes.shape[1]) / 4).to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "bitnet", **said}, "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stock_logits(folder: Path) -> Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval().to(torch.float32)(IDS).logits  # autobitlinear leaves what is not quantized in the file's dtype


@pytest.mark.parametrize("peer", PEERS)
def test_logits_are_those_of_the_stock_layers(tmp_path: Path, peer: str) -> None:
    folder = checkpoint(tmp_path / "x", peer)
    expected = stock_logits(folder)
    model = bitnet.load(folder)
    assert len(packed_layers(model)) == 14 and "lm_head" not in packed_layers(model)
    torch.testing.assert_close(model(IDS).logits, expected, atol=2e-3, rtol=1e-3)
    assert (model(IDS).logits - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize("peer", PEERS)
def test_latent_weights_start_from_the_same_codes_and_scales(tmp_path: Path, peer: str) -> None:
    """Re-ternarizing codes * scale would shrink every layer by the fraction of non-zero codes."""
    folder = checkpoint(tmp_path / "x", peer)
    packed, model = bitnet.load(folder), bitnet.load(folder, latent=True)
    layers = dict(bitlinears(model))
    assert layers.keys() == packed_layers(packed).keys()
    for name, layer in packed_layers(packed).items():
        codes, scale = qat.ops.quantize_weight(layers[name].weight, qat.QuantConfig())
        assert torch.equal(codes, layer.codes())
        torch.testing.assert_close(scale, layer.weight_scale, atol=0, rtol=1e-5)
        shrunk = qat.ops.quantize_weight(layer.dequantize(), qat.QuantConfig())[1]
        assert float((shrunk / scale).detach()) < 0.8
    torch.testing.assert_close(model(IDS).logits, packed(IDS).logits, atol=2e-3, rtol=1e-3)
    model(IDS).logits.sum().backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in layers.values())
    qat.pack(model)
    torch.testing.assert_close(model(IDS).logits, packed(IDS).logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("norms", [{}, {"use_rms_norm": True, "rms_norm_eps": 0.01}])
def test_online_checkpoints_have_latent_weights(tmp_path: Path, norms: dict[str, object]) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(BitNetConfig(**TINY)).save_pretrained(tmp_path / "x")
    config, file = json.loads((tmp_path / "x/config.json").read_text()), tmp_path / "x/model.safetensors"
    said = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online", **norms}
    (tmp_path / "x/config.json").write_text(json.dumps(config | {"quantization_config": said}))
    if norms:
        tensors = load_file(file)
        names = [name for name, tensor in tensors.items() if tensor.ndim == 2 and "layers" in name]
        for name in names:
            tensors[f"{name.removesuffix('.weight')}.rms_norm.weight"] = 1 + torch.randn(tensors[name].shape[1]) / 4
        save_file(tensors, file, {"format": "pt"})
    expected = stock_logits(tmp_path / "x")
    for latent in (False, True):
        model = bitnet.load(tmp_path / "x", latent=latent)
        assert len(dict(bitlinears(model)) if latent else packed_layers(model)) == 14
        torch.testing.assert_close(model(IDS).logits, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("linear_class", hf.LINEAR_CLASSES)
def test_our_own_hf_folder(tmp_path: Path, linear_class: str) -> None:
    """Also of transformers' own BitNet architecture, with its norms before o_proj and down_proj."""
    model = AutoModelForCausalLM.from_config(BitNetConfig(**TINY)).eval()
    qat.convert(model)
    qat.pack(model)
    hf.save(model, tmp_path / "x", linear_class=linear_class)
    again = bitnet.load(tmp_path / "x")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    for name, layer in packed_layers(model).items():
        assert torch.equal(again.get_submodule(name).packed, layer.packed)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "x", "Falcon-E")
    file, config = folder / "model.safetensors", folder / "config.json"
    whole, said = file.read_bytes(), config.read_text()
    q = "model.layers.0.self_attn.q_proj"

    def change(edit: object) -> None:
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)

    def say(**keys: object) -> None:
        read = json.loads(said)
        read["quantization_config"] |= keys
        config.write_text(json.dumps(read))

    cases = (
        (lambda: say(use_rms_norm=True), "no tensor model.layers.0.self_attn.q_proj.rms_norm.weight"),
        (lambda: say(use_rms_norm=True, rms_norm_eps="much"), "rms_norm_eps must be a number between 0 and 1, not 'much'"),
        (lambda: change(lambda t: t.update({f"{q}.rms_norm.weight": torch.ones(32)})), f"unexpected keys {q}.rms_norm.weight"),
        (lambda: say(linear_class="other"), "linear_class='other' is not known"),
        (lambda: say(quant_method="gptq"), "no bitnet checkpoint"),
        (lambda: change(lambda t: t.pop(f"{q}.weight_scale")), f"no tensor {q}.weight_scale"),
        (lambda: change(lambda t: t.update({f"{q}.weight_scale": torch.zeros(1)})), "one finite value above 0"),
        (lambda: change(lambda t: t.update({f"{q}.weight_scale": torch.ones(32)})), "one finite value above 0"),
        (lambda: change(lambda t: t[f"{q}.weight"][0, 0].fill_(255)), r"no ternary code in row 0, column 0"),
        (lambda: change(lambda t: t.update({f"{q}.weight": torch.zeros(32, 32) + 0.5})), "no ternary code"),
        (lambda: change(lambda t: t.update({f"{q}.weight": t[f"{q}.weight"][1:].contiguous()})), "not uint8"),
        (lambda: change(lambda t: t.pop("model.norm.weight")), "missing keys|no weights for 1 tensors"),
        (lambda: file.write_bytes(whole[:-3]), "not a whole safetensors file"),
    )
    for damage, message in cases:
        file.write_bytes(whole)
        config.write_text(said)
        damage()
        with pytest.raises(ValueError, match=message):
            bitnet.load(folder)
