"""The table of metrics: names and patterns are found, whatever a run writes is in it, and what is not is said."""

from __future__ import annotations

import pytest

from qat.losses import LOSSES
from qat.monitor.table import METRICS, SECTIONS, find, result_metrics


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("val/gap", "val/gap"),
        ("train/kl", "train/kl"),
        ("train/hidden", "train/{term}"),
        ("train/weight/kl", "train/weight/{term}"),
        ("quant/zero_fraction", "quant/zero_fraction"),
        ("quant/q/zero_fraction", "quant/{family}/zero_fraction"),
        ("quant/mlp.c_proj/flip_rate", "quant/{family}/flip_rate"),
        ("optim/grad_norm", "optim/grad_norm"),
        ("optim/grad_norm/hidden", "optim/grad_norm/{term}"),
        ("result/perplexity/trained", "result/perplexity/{stage}"),
        ("result/verification/gguf/perplexity", "result/{what...}"),
    ],
)
def test_names_are_found(name: str, row: str) -> None:
    assert find(name) is METRICS[row]


@pytest.mark.parametrize("name", ["quant/flip_rat", "quant/q/k/flip_rate", "val", "loss", "", "quant/{family}/zero_fraction/x"])
def test_what_is_none_is_said(name: str) -> None:
    with pytest.raises(ValueError, match="is no metric; there are "):
        find(name)


def test_the_nearest_names_are_said() -> None:
    with pytest.raises(ValueError, match="'quant/flip_rat' is no metric; there are quant/flip_rate"):
        find("quant/flip_rat")


def test_rows_say_what_they_are() -> None:
    for name, metric in METRICS.items():
        assert metric.section == (name.partition("/")[0] if "/" in name else "") and metric.section in {"", *SECTIONS}
        assert metric.better in ("up", "down", "none") and metric.says.endswith(".")
    assert all(find(f"{part}/{loss}").section == part for part in ("train", "val") for loss in LOSSES)


def test_numbers_of_a_result_by_their_keys() -> None:
    found = result_metrics({"bytes": {"packed_model": 9}, "recovered_share": 0.5, "ok": True, "recipe": "x", "tokens": 3})
    assert found == {"result/bytes/packed_model": 9.0, "result/recovered_share": 0.5, "result/tokens": 3.0}
    assert all(find(name).section == "result" for name in found)
