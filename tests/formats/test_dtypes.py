"""What is not quantized keeps the dtype of its source on disk, and no number changes by being written."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZES
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config

import qat
from qat.config import DataConfig, ExportConfig, ModelConfig, RunConfig, TrainConfig, TrainerConfig
from qat.formats import get_format
from qat.formats.bitnet import reading
from qat.formats.dtypes import remember, round_floats, source_dtypes, stored_dtypes
from qat.formats.packed import folder as packed
from qat.models.hub import load_model
from qat.train import run

IDS = torch.arange(16)[None]
FLOAT = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


def source(folder: Path, config: object, dtype: torch.dtype, own: dict[str, torch.dtype] | None = None) -> Path:
    """A random model of `dtype`, with some tensors of another; biases are not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(folder)
    if own:
        tensors = load_file(folder / "model.safetensors")
        save_file({k: t.to(own.get(k, dtype)) for k, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def converted(folder: Path) -> nn.Module:
    model = load_model(ModelConfig(path=str(folder)))
    qat.convert(model)
    return model


def dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Of the tensors that are neither codes nor scales."""
    found = {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}
    return {
        name: dtype
        for name, dtype in found.items()
        if dtype.is_floating_point and not name.endswith("weight_scale") and f"{name}_scale" not in found
    }


@pytest.mark.parametrize("dtype", FLOAT)
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_both_folders_keep_the_source_s_dtype(tmp_path: Path, kind: type, dtype: torch.dtype) -> None:
    model = converted(source(tmp_path / "source", kind(**SIZES), dtype))
    qat.pack(model)
    expected = model(input_ids=IDS).logits
    packed.save(model, tmp_path / "packed")
    get_format("hf").save(model, tmp_path / "hf")
    for folder in (tmp_path / "packed", tmp_path / "hf"):
        assert set(dtypes(folder).values()) == {dtype} and "model.embed_tokens.weight" in dtypes(folder)
    again = packed.load(tmp_path / "packed")
    assert all(parameter.dtype == torch.float32 for parameter in again.parameters())
    assert torch.equal(again(input_ids=IDS).logits, expected)
    assert torch.equal(reading.load(tmp_path / "hf")(input_ids=IDS).logits, expected)
    assert sum(t.nbytes for t in load_file(tmp_path / "packed/model.safetensors").values()) == sum(
        t.nbytes for t in load_file(tmp_path / "hf/model.safetensors").values()
    )


def test_each_tensor_keeps_its_own_dtype_also_when_exported_from_the_packed_folder(tmp_path: Path) -> None:
    own = {"model.norm.weight": torch.float32, "model.embed_tokens.weight": torch.float16}
    model = converted(source(tmp_path / "source", Qwen2Config(**SIZES), torch.bfloat16, own))
    qat.pack(model)
    packed.save(model, tmp_path / "packed")
    get_format("hf").save(packed.load(tmp_path / "packed"), tmp_path / "hf")
    for folder in (tmp_path / "packed", tmp_path / "hf"):
        found = dtypes(folder)
        assert {name: found.pop(name) for name in own} == own
        assert set(found.values()) == {torch.bfloat16} and any(name.endswith("q_proj.bias") for name in found)


def test_transposed_layers_and_renamed_tensors(tmp_path: Path) -> None:
    """GPT-2's checkpoints lack the model's prefix, and its matrices lie the other way round."""
    sizes = {"vocab_size": 32, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    folder = source(tmp_path / "source", GPT2Config(**sizes), torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    model = converted(folder)
    qat.pack(model)
    packed.save(model, tmp_path / "packed")
    assert set(dtypes(tmp_path / "packed").values()) == {torch.bfloat16}


def test_trained_floats_are_rounded_once_and_untrained_ones_not_at_all(tmp_path: Path) -> None:
    model = converted(source(tmp_path / "source", Qwen2Config(**SIZES), torch.bfloat16))
    before = copy.deepcopy(model.state_dict())
    round_floats(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    latent = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in stored_dtypes(model)}
    assert len(latent) == 14
    round_floats(model)
    trained = model(input_ids=IDS).logits
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in latent.items())
    qat.pack(model)
    packed.save(model, tmp_path / "packed")
    assert set(dtypes(tmp_path / "packed").values()) == {torch.bfloat16}
    assert torch.equal(packed.load(tmp_path / "packed")(input_ids=IDS).logits, trained)


def test_what_was_not_rounded_is_stored_as_it_is_or_refused(tmp_path: Path) -> None:
    model = converted(source(tmp_path / "source", LlamaConfig(**SIZES), torch.bfloat16))
    with torch.no_grad():
        model.model.norm.weight.add_(1e-5)
    qat.pack(model)
    packed.save(model, tmp_path / "packed")
    found = dtypes(tmp_path / "packed")
    assert found.pop("model.norm.weight") == torch.float32 and set(found.values()) == {torch.bfloat16}
    message = "model.norm.weight holds values that bfloat16 does not; round them first"
    with pytest.raises(ValueError, match=message):
        packed.save(model, tmp_path / "other", floats="bfloat16")
    with pytest.raises(ValueError, match=message):
        get_format("hf").save(model, tmp_path / "other", floats="bfloat16")
    round_floats(model, "bfloat16")
    packed.save(model, tmp_path / "other", floats="bfloat16")
    assert set(dtypes(tmp_path / "other").values()) == {torch.bfloat16}
    with pytest.raises(ValueError, match="floats='int8' is not allowed; choose one of source, float32, bfloat16, float16"):
        packed.save(model, tmp_path / "third", floats="int8")


def test_values_beyond_float16_become_its_largest() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([1e6, -1e6]))
    round_floats(model, "float16")
    assert model[0].bias.tolist() == [65504, -65504]


def test_a_wider_dtype_than_the_model_s_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    remember(model, {"0.bias": torch.float64})
    before = model[0].bias.clone()
    round_floats(model)
    assert torch.equal(model[0].bias, before) and stored_dtypes(model)["0.bias"] == torch.float64


@pytest.mark.parametrize(("floats", "dtype"), [("source", torch.bfloat16), ("float16", torch.float16)])
def test_a_run_measures_what_it_stores(
    tiny_model: Path, text_file: Path, tmp_path: Path, floats: str, dtype: torch.dtype
) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "source")
    result = run(
        TrainConfig(
            model=ModelConfig(path=str(tmp_path / "source")),
            data=DataConfig(train=str(text_file), sequence_length=32, batch_size=4, valid_fraction=0.1),
            trainer=TrainerConfig(max_steps=3, accelerator="cpu", progress=False, threads=1),
            export=ExportConfig(formats=["hf"], floats=floats),
            run=RunConfig(dir=str(tmp_path / "run")),
        )
    )
    values = result.perplexity
    assert values["trained"] == values["packed"] == pytest.approx(values["exported"], rel=1e-6)
    for folder in ("packed", "model"):
        assert set(dtypes(tmp_path / "run" / folder).values()) == {dtype}
    model = packed.load(tmp_path / "run/packed")
    assert set(source_dtypes(model).values()) == {dtype}
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    assert not torch.equal(model.model.norm.weight, first.model.norm.weight)
