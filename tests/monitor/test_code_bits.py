"""Codes as packed bits: counts are those of the codes themselves; families are told apart by names."""

from __future__ import annotations

import pytest
import torch

from qat.conversion.families import families
from qat.monitor import bits
from qat.monitor.bits import joined, ones, packed, spans, totals
from qat.monitor.trace import Trace


def test_bits_are_counted_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "SPAN", 3)  # several parts
    codes = [torch.randint(-1, 2, shape, dtype=torch.int8) for shape in ((1, 1), (8, 8), (3, 43), (5, 100), (0, 4), (7, 7))]
    codes[1].fill_(-1)
    layers = [packed(one) for one in codes]
    lengths = [len(kept) for kept, _ in layers]
    assert lengths == [1, 1, 3, 8, 0, 1]
    kept, above = joined(layers)
    assert kept.dtype == torch.int64 and len(kept) == sum(lengths) and len(spans(kept)) == 5
    assert totals(ones(kept), lengths).tolist() == [int((one != 0).sum()) for one in codes]
    assert totals(ones(above), lengths).tolist() == [int((one > 0).sum()) for one in codes]
    assert ones(kept ^ kept).sum() == 0 and ones(torch.full((2,), -1)).tolist() == [64, 64]


def test_changes_over_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "SPAN", 2)
    looks = [torch.randint(-1, 2, (9, 23), dtype=torch.int8) for _ in range(8)]
    trace = Trace.begun([packed(looks[0])])
    for i, now in enumerate(looks[1:], 1):
        trace = Trace.of(trace.state(), torch.device("cpu"))
        trace, found = trace.looked([packed(now)])
        flips = torch.stack([looks[j] != looks[j - 1] for j in range(max(1, i - 3), i + 1)])
        expected = {
            "flip_rate": now != looks[i - 1],
            "sign_flips": now * looks[0] == -1,
            "mask_changes": (now == 0) != (looks[0] == 0),
            "oscillating": flips.sum(0) >= 2,
        }
        assert {name: value.item() for name, value in found.items()} == {name: int(one.sum()) for name, one in expected.items()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["layers.0.self_attn.q_proj", "layers.11.self_attn.q_proj", "layers.0.mlp.down_proj"], ["q", "q", "down"]),
        (["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.attn.c_attn"], ["attn.c_proj", "mlp.c_proj", "c_attn"]),
        (
            ["l.0.attention.output.dense", "l.0.output.dense", "l.0.dense"],
            ["attention.output.dense", "l.output.dense", "l.dense"],
        ),
        (["proj", "_proj"], ["proj", "_proj"]),
        (["0", "1"], ["layers", "layers"]),
    ],
)
def test_families_by_names(names: list[str], expected: list[str]) -> None:
    assert [*families(names).values()] == expected
