"""What a run logs of itself: every name is in the table of metrics."""

from __future__ import annotations

import copy
import csv
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from tiny_run import TRAINER, killed_and_resumed

from qat.config import DistillConfig, QuantConfig, TrainConfig
from qat.conversion.layers import bitlinears
from qat.monitor.layers import read_layers
from qat.monitor.table import SECTIONS, find, result_metrics
from qat.train import run
from qat.training.gradients.clipping import gradient_norm


def rows_of(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv, without empty cells."""
    with (folder / "metrics.csv").open() as lines:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(lines)]


def test_every_column_and_every_number_of_a_result_is_in_the_table(config: TrainConfig) -> None:
    config.distill = DistillConfig(ce=0.5, kl=0.5, hidden=1.0, balance=4)
    config.trainer = replace(TRAINER, max_steps=6, val_every=3, accumulate_grad_batches=2, monitor_every=2)
    result = run(config)
    found = rows_of(Path(result.folder))
    names = {name for row in found for name in row} | result_metrics(result.to_dict()).keys()
    assert {find(name).section for name in names} == {"", *SECTIONS}
    assert [row["tokens"] for row in found if "tokens" in row] == [2 * 4 * 32 * step for step in range(1, 7)]
    with pytest.raises(ValueError, match="is no metric"):
        find("lr-AdamW")


SMALL = replace(TRAINER, max_steps=12, val_every=4, monitor_every=2, log_every_n_steps=3, gradient_clip_val=0.2)


def without_speed(folder: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.startswith("speed/")} for row in rows_of(folder)]


def test_a_killed_run_s_rows_and_looks_are_those_of_an_undisturbed_one(config: TrainConfig, tmp_path: Path) -> None:
    config.trainer, config.optim = SMALL, replace(config.optim, lambda_steps=3)
    whole = Path(run(copy.deepcopy(config)).folder)
    parts = killed_and_resumed(copy.deepcopy(config), tmp_path / "parts", 8, 5)
    assert without_speed(parts) == without_speed(whole)
    assert (parts / "layers.arrow").read_bytes() == (whole / "layers.arrow").read_bytes()
    assert (parts / "alarms.jsonl").exists() == (whole / "alarms.jsonl").exists()
    found = read_layers(whole)
    assert found["step"].tolist() == [0, 2, 4, 6, 8, 10, 12] and len(found["layer"]) == 14
    rows = {int(row["step"]): row for row in rows_of(whole) if "quant/flip_rate" in row}
    assert list(rows) == [2, 4, 6, 8, 10, 12]
    last = rows[12]
    assert 0 < last["quant/flip_rate"] < 0.5 and 0 < last["quant/oscillating"] <= 1
    assert last["quant/sign_flips"] + last["quant/mask_changes"] > last["quant/flip_rate"] / 2
    assert [row["optim/lambda"] for row in rows_of(whole) if "optim/lambda" in row] == pytest.approx([2 / 3, 1, 1, 1])


def test_a_gradient_s_norm_is_0_only_of_zeros() -> None:
    tiny, zeros, plain = torch.full((3, 3), 1e-30), torch.zeros(2, 2), torch.full((4, 4), 0.5)
    assert [float(gradient_norm([one])) for one in (tiny, zeros, plain)] == pytest.approx([3e-30, 0, 2])


def test_numbers_of_looks_are_those_of_the_model(config: TrainConfig) -> None:
    config.trainer, config.optim = replace(SMALL, max_steps=4), replace(config.optim, anneal="none")
    config.callbacks = {"keeps": {"_target_": "test_monitoring.Keeps"}}
    folder = Path(run(config).folder)
    found, rows = read_layers(folder), rows_of(folder)
    [row] = [row for row in rows if row["step"] == 4 and "quant/scale" in row]
    (start, now), sizes = Keeps.codes, [codes.size for codes, _ in Keeps.codes[1].values()]
    for i, (name, (codes, weight)) in enumerate(now.items()):
        assert found["layer"][i] == name
        scale = max(float(np.abs(weight).mean(dtype=np.float64)), 1e-30)
        assert found["zero_fraction"][-1, i] == pytest.approx((codes == 0).mean())
        assert found["scale"][-1, i] == pytest.approx(scale, rel=1e-5)
        assert found["error"][-1, i] == pytest.approx(np.linalg.norm(weight - scale * codes) / np.linalg.norm(weight), rel=1e-4)
        near = np.abs(np.abs(weight) - scale / 2) < 0.05 * scale
        assert found["dead_zone"][-1, i] == pytest.approx(near.mean(), abs=2 / codes.size)
        signs = (codes * start[name][0] == -1).mean()
        assert found["sign_flips"][-1, i] == pytest.approx(signs, abs=1e-7)
        assert found["grad_norm"][-1, i] > 0 and found["act_absmax"][-1, i] > 0 and found["act_peak"][-1, i] > 1
    changed = sum(int(((codes == 0) != (start[name][0] == 0)).sum()) for name, (codes, _) in now.items())
    assert row["quant/mask_changes"] == pytest.approx(changed / sum(sizes))
    assert row["quant/act_absmax"] == pytest.approx(max(found["act_absmax"][-1]))
    downs = [i for i, family in enumerate(found["family"]) if family == "down"]
    assert row["quant/down/zero_fraction"] == pytest.approx(np.mean(found["zero_fraction"][-1, downs]))  # of equal sizes
    held_out = [row for row in rows if "val/ce" in row][-1]
    assert held_out["val/gap"] == pytest.approx(held_out["val/ce"] - held_out["val/full_precision_ce"], abs=1e-6)
    assert held_out["val/teacher_ce"] == held_out["val/full_precision_ce"] and 0 < held_out["val/agreement"] <= 1
    assert held_out["val/perplexity"] == pytest.approx(np.exp(held_out["val/ce"]), rel=1e-6)


class Keeps(pl.Callback):
    """Codes and weights of the first moment and of the last."""

    codes: ClassVar[list[dict[str, Any]]] = []

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        Keeps.codes = [self.now(module)]

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        Keeps.codes.append(self.now(module))

    def now(self, module: Any) -> dict[str, Any]:
        layers = dict(bitlinears(module.student))
        return {name: (layer.quantized()[0].numpy(), layer.weight.detach().numpy().copy()) for name, layer in layers.items()}


def test_inputs_of_accumulated_batches_count_as_those_of_one(config: TrainConfig, tmp_path: Path) -> None:
    found = []
    for batch, accumulate in ((4, 1), (1, 4)):
        config.data, config.run = replace(config.data, batch_size=batch), replace(config.run, dir=str(tmp_path / str(batch)))
        config.trainer = replace(SMALL, max_steps=1, val_every=None, monitor_every=1, accumulate_grad_batches=accumulate)
        found.append(read_layers(Path(run(config).folder)))
    for name in ("act_absmax", "act_peak", "act_outliers", "act_clipped"):  # of what lies before any dropout
        np.testing.assert_allclose(found[1][name][1, :3], found[0][name][1, :3], rtol=1e-6)


@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig(components=2),
        QuantConfig(weight="binary", scale="absmean", act_bits=None),
        QuantConfig(granularity="channel", act_bits=4),
        QuantConfig(weight="ternary", granularity="group", group_size=16),
        QuantConfig(rms_norm_eps=1e-5),
        *(QuantConfig(weight=name) for name in ("lsq", "twn", "sherry")),
    ],
    ids=lambda quant: f"{quant.weight}-{quant.components}-{quant.granularity}-{quant.act_bits}-{quant.rms_norm_eps}",
)
def test_every_kind_of_quantizer_is_looked_at(config: TrainConfig, quant: QuantConfig) -> None:
    config.quant, config.trainer = quant, replace(SMALL, max_steps=2, val_every=None)
    config.model.exclude = ["*down_proj"]
    [row] = [row for row in rows_of(Path(run(config).folder)) if "quant/flip_rate" in row]
    assert 0 <= row["quant/flip_rate"] < 0.5 and 0 < row["quant/error"] < 2 and row["quant/q/scale"] > 0
    assert (row["quant/zero_fraction"] == 0) == (quant.weight == "binary") and ("quant/act_clipped" in row) == bool(
        quant.act_bits
    )


def test_a_run_without_looks_writes_no_layers(config: TrainConfig) -> None:
    config.trainer = replace(SMALL, max_steps=2, val_every=None, monitor_every=None)
    folder = Path(run(config).folder)
    assert not (folder / "layers.arrow").exists() and not any("quant/scale" in row for row in rows_of(folder))
