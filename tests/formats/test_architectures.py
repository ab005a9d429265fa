"""Tiny random models of each architecture: what docs/reference/architectures.md says of them is what happens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, COLUMNS, Row, in_page, table
from torch import nn

import qat
from qat import QuantConfig

ROWS: dict[str, list[str]] = {}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str, tmp_path: Path) -> None:
    """Each step is asserted inside: every converted weight trains, packing and folders change no logit."""
    cells = ROWS[name] = Row(ARCHITECTURES[name], tmp_path).cells()
    assert len(cells) == len(COLUMNS) and cells[0]
    if cells[0].startswith("refused"):
        assert "3-D parameter" in cells[0] and cells[1:] == [""] * (len(COLUMNS) - 1)


def test_the_table_in_the_docs_is_current() -> None:
    if ROWS.keys() != ARCHITECTURES.keys():
        pytest.skip("needs the rows of the whole file")
    assert in_page() == table(ROWS), "run: python tests/architectures.py"


@pytest.mark.parametrize(("name", "head"), [("Llama", "lm_head"), ("BERT", "cls.predictions.decoder"), ("ViT", "classifier")])
def test_heads_stay_in_full_precision(name: str, head: str) -> None:
    assert head in qat.convert(ARCHITECTURES[name].build()).skipped


def test_heads_of_several_layers_stay_whole() -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, vocab_size=32))
    record = qat.convert(model)
    assert {"classifier.dense", "classifier.out_proj"} <= record.skipped.keys() and len(record.converted) == 6
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, vocab_size=32))
    assert qat.convert(model, include="classifier.dense").converted == ["classifier.dense"]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "experts excluded" in name])
def test_experts_are_refused_by_name_and_listed_once_excluded(name: str) -> None:
    message = r"model.layers.0.mlp.experts \(\w+Experts\) stores 4 expert matrices as the one 3-D parameter 'gate_up_proj'"
    with pytest.raises(ValueError, match=message):
        qat.convert(ARCHITECTURES[name].build())
    record = qat.convert(ARCHITECTURES[name].build(), exclude="*experts")
    assert "model.layers.1.mlp.experts.down_proj" in record.skipped
    assert any("mlp.gate" in skipped for skipped in record.skipped)


def test_layers_answer_for_the_weight_that_they_replace() -> None:
    """T5 casts its hidden states to `self.wo.weight.dtype`."""
    model = nn.Sequential(nn.Linear(8, 4).to(torch.bfloat16))
    qat.convert(model)
    qat.pack(model)
    weight = model[0].weight
    assert weight.shape == (4, 8) and weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="0: the weight's values were read"):
        weight.sum()
    assert model.to(torch.float16)[0].weight.dtype == torch.float16 and model.float()[0].weight.dtype == torch.float32
    assert "0.weight" not in model.state_dict() and list(model.parameters()) == []


def test_t5_compiles_in_one_graph() -> None:
    model = ARCHITECTURES["T5"].build()
    qat.convert(model)
    qat.pack(model)
    block = model.encoder.block[0].layer[1].DenseReluDense
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        expected = block(x)
        assert torch.equal(torch.compile(block, backend="eager", fullgraph=True)(x), expected)


def test_per_channel_binary_trains_and_packs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = qat.convert
    monkeypatch.setattr(
        qat,
        "convert",
        lambda m, **options: convert(m, QuantConfig(weight="binary", granularity="channel"), **options),
        raising=False,
    )
    cells = Row(ARCHITECTURES["Llama"], tmp_path).cells()
    assert cells[:4] == ["14 layers", "yes", "yes", "yes"] and "ternary weights only" in cells[4]
