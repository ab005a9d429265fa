"""The record of a conversion: it rebuilds the layers in a fresh model, and refuses what is not its own."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import Block, Model, assert_untouched
from torch import nn

import qat
from qat import Conversion, QuantConfig

transformers_conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
TOKENS = torch.arange(6).reshape(2, 3)


@pytest.mark.parametrize("kind", ["bitlinear", "packed"])
def test_the_record_as_json_rebuilds_the_layers_in_a_fresh_model(kind: str) -> None:
    model, config = Model(), QuantConfig(granularity="channel", scale="absmax", act_granularity="tensor", eps=1e-4)
    record = qat.convert(model, config, exclude="*0.up")
    record = record if kind == "bitlinear" else qat.pack(model, layout="base3")
    fresh = Model().eval()
    again = Conversion.from_json(record.to_json())
    assert again == record
    again.apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(TOKENS), model(TOKENS)) and not fresh.blocks[1].up.training
    with pytest.raises(ValueError, match="the record converts 'blocks.0.down', which is a .*BitLinear in this Model"):
        again.apply(fresh)


def test_the_record_rebuilds_conv1d_layers() -> None:
    model, fresh, x = nn.Sequential(transformers_conv1d(5, 8)), nn.Sequential(transformers_conv1d(5, 8)), torch.randn(2, 8)
    qat.convert(model)
    Conversion.from_json(qat.pack(model).to_json()).apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_a_record_of_another_model_names_the_missing_layer_and_changes_nothing() -> None:
    record, other = qat.convert(Model()), nn.ModuleDict({"blocks": nn.ModuleList([Block()])})
    with pytest.raises(ValueError, match="the record converts 'blocks.1.up', which is missing in this ModuleDict"):
        record.apply(other)
    assert_untouched(other)


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"kind": "unpacked"}, {"config": {"weight": "int4"}}, {"extra": 1}, {"kind": "packed", "layout": None}],
    ids=str,
)
def test_a_record_that_is_not_ours_is_refused(change: dict[str, object]) -> None:
    data = json.loads(qat.convert(Model()).to_json())
    for text in (json.dumps({**data, **change}), "{}", "[]", "not json"):
        with pytest.raises(ValueError, match="not a conversion record of qat"):
            Conversion.from_json(text)
