"""Any form of a model, found out and loaded: what it is said to be, and that it is the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import qat
from qat.formats.bitnet import writing as hf
from qat.formats.packed import folder as packed
from qat.models.any import load

IDS = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval().requires_grad_(False)
    qat.convert(model)
    qat.pack(model)
    return model


def test_a_run_a_packed_folder_and_full_precision(tmp_path: Path, tiny_model: Path, model: PreTrainedModel) -> None:
    packed.save(model, tmp_path / "run/packed", tokenizer=AutoTokenizer.from_pretrained(tiny_model))
    said = {"run": f"packed model of the run {tmp_path / 'run'}", "run/packed": "packed model of qat"}
    for path, kind in said.items():
        found = load(str(tmp_path / path))
        assert found.kind == kind and torch.equal(found.model(IDS).logits, model(IDS).logits)
        assert found.tokenizer("the cat").input_ids == AutoTokenizer.from_pretrained(tiny_model)("the cat").input_ids
    assert load(str(tiny_model)).kind == "full precision (float32)"


def test_a_run_that_has_no_packed_model_says_how_it_ended(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"status": "interrupted at step 31; continue with resume=x"}')
    with pytest.raises(ValueError, match="has no packed model: the run is interrupted at step 31; continue with resume=x"):
        load(str(tmp_path))
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match="has no packed model: its result.json cannot be read"):
        load(str(tmp_path))


@pytest.mark.parametrize("linear_class", hf.LINEAR_CLASSES)
def test_a_stock_folder_is_read_by_transformers(
    tmp_path: Path, tiny_model: Path, model: PreTrainedModel, linear_class: str
) -> None:
    hf.save(model, tmp_path / "x", AutoTokenizer.from_pretrained(tiny_model), linear_class=linear_class)
    with torch._dynamo.config.patch(disable=True):
        found = load(str(tmp_path / "x"))
        torch.testing.assert_close(found.model(IDS).logits, model(IDS).logits, atol=2e-3, rtol=2e-3)
    assert found.kind == f"stock bitnet folder (linear_class {linear_class}), read by transformers"
    assert not found.model.training and type(found.model.model.layers[0].mlp.up_proj).__name__ != "PackedBitLinear"


def test_a_stock_folder_without_a_weight_is_refused(tmp_path: Path, tiny_model: Path, model: PreTrainedModel) -> None:
    hf.save(model, tmp_path / "x", AutoTokenizer.from_pretrained(tiny_model))
    tensors = load_file(tmp_path / "x/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "x/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"x does not fit its own config: missing keys model.norm.weight"):
        load(str(tmp_path / "x"))
    (tmp_path / "x/model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot load the model .*x: "):
        load(str(tmp_path / "x"))
