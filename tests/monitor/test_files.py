"""The files of layers and of alarms: what a kill at any byte loses, and what a run that goes on repeats."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from qat.monitor import alarms, layers
from qat.monitor.alarms import Alarm, AlarmsFile, read_alarms
from qat.monitor.layers import STATISTICS, LayersFile, read_layers

LAYERS = {"layers.0.q_proj": "q", "layers.0.down_proj": "down"}


def written(folder: Path, steps: list[int], step: int | None = None) -> None:
    file = LayersFile(folder, LAYERS, step)
    for one in steps:
        file.write(one, {"flip_rate": np.array([one / 8, 0.5], dtype=np.float32), "scale": np.array([np.nan, one])})


def test_looks_are_read_as_steps_by_layers(tmp_path: Path) -> None:
    assert read_layers(tmp_path) == {}
    written(tmp_path, [0, 4, 8])
    found = read_layers(tmp_path)
    assert set(found) == {"step", "layer", "family", *STATISTICS}
    assert (
        found["step"].tolist() == [0, 4, 8] and found["layer"].tolist() == [*LAYERS] and found["family"].tolist() == ["q", "down"]
    )
    assert found["flip_rate"].dtype == np.float32 and found["flip_rate"].tolist() == [[0, 0.5], [0.5, 0.5], [1, 0.5]]
    np.testing.assert_array_equal(found["scale"], np.array([[np.nan, 0], [np.nan, 4], [np.nan, 8]], dtype=np.float32))
    assert np.isnan(found["error"]).all()
    assert pa.ipc.open_stream((tmp_path / layers.NAME).read_bytes()).read_all().num_rows == 6  # any Arrow reader's


def test_a_kill_at_any_byte_loses_one_look(tmp_path: Path) -> None:
    written(tmp_path, [1])
    one = (tmp_path / layers.NAME).stat().st_size
    written(tmp_path, [1, 2, 3])
    whole = (tmp_path / layers.NAME).read_bytes()
    two = one + (len(whole) - one) // 2
    for cut in range(0, len(whole), 7):
        (tmp_path / layers.NAME).write_bytes(whole[:cut])
        steps = read_layers(tmp_path)["step"].tolist() if cut >= one else []
        assert steps == [1, 2][: (cut >= one) + (cut >= two)]
    for cut in (two + 5, one - 3, 0, 9):
        (tmp_path / layers.NAME).write_bytes(whole[:cut])
        written(tmp_path, [1, 2, 3], step=2)
        assert (tmp_path / layers.NAME).read_bytes() == whole


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    written(tmp_path, [2, 4, 6])
    undisturbed = (tmp_path / layers.NAME).read_bytes()
    written(tmp_path, [4, 6], step=4)  # it looks again where it begins
    assert (tmp_path / layers.NAME).read_bytes() == undisturbed
    written(tmp_path, [1])  # a new run
    assert read_layers(tmp_path)["step"].tolist() == [1]


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"step,layer\n", b"\xff\xff\xff\xff\xf0\xff\xff\x7f" * 9])
def test_a_file_that_is_none_is_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / layers.NAME).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_layers(tmp_path) == {}


A = Alarm(10, "zero_collapse", "all codes of q are 0", "quant.scale=absmean", "q")
B = Alarm(20, "divergence", "the loss rises", "optim.lr=1e-3")


def test_alarms_are_read_with_when_they_cleared(tmp_path: Path) -> None:
    assert read_alarms(tmp_path) == []
    file = AlarmsFile(tmp_path)
    for alarm in (A, B):
        file.raised(alarm)
    file.cleared(A, 30)
    file.raised(Alarm(40, *("zero_collapse", "again", "", "q")))
    again = Alarm(40, "zero_collapse", "again", "", "q")
    assert read_alarms(tmp_path) == [Alarm(**{**vars(A), "until": 30}), B, again]
    assert A.line == "step 10: all codes of q are 0; try quant.scale=absmean" and again.line == "step 40: again"


def test_torn_and_odd_lines_of_alarms_are_none(tmp_path: Path) -> None:
    file = AlarmsFile(tmp_path)
    for alarm in (A, B):
        file.raised(alarm)
    whole = (tmp_path / alarms.NAME).read_bytes()
    for cut in range(len(whole)):
        (tmp_path / alarms.NAME).write_bytes(whole[:cut])
        assert read_alarms(tmp_path) == [A, B][: (cut >= whole.index(b"\n")) + (cut >= len(whole) - 1)]
    (tmp_path / alarms.NAME).write_bytes(whole[:-9] + b'\n[1]\n{"step": 1}\n{"step": true, "clears": "x", "where": ""}\n\0\n')
    assert read_alarms(tmp_path) == [A]
    AlarmsFile(tmp_path, 15).raised(B)
    assert (tmp_path / alarms.NAME).read_bytes() == whole
    AlarmsFile(tmp_path)
    assert read_alarms(tmp_path) == []
