"""The benchmark runs, and its rows say what they must."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from qat.bench import __main__ as bench
from qat.bench import layers as bench_layers
from qat.ops import cpu

if not cpu.compiled():
    pytest.skip(f"no compiled kernels: {cpu.status().why}", allow_module_level=True)


def test_rows(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    monkeypatch.setattr(bench_layers, "COLD_BYTES", 1 << 16)
    options = "--shapes 64x128 --tokens 1 3 --seconds 0.01 --train-tokens 8 --rounds 2 --threads 1 --json"
    monkeypatch.setattr(sys, "argv", ["bench", *options.split(), str(file)])
    bench.main()
    result = json.loads(file.read_text())
    assert result["environment"]["isa"] == cpu.isa()
    found = {(row["regime"], row["what"]) for row in result["rows"]}
    assert {
        ("cold", "qat 2bit"),
        ("hot", "qat base3"),
        ("hot", bench_layers.BASELINE),
        ("train fp32", "qat backward=int8"),
        ("train fp32", "qat annealed, backward=bf16"),
    } <= found
    assert all(row["microseconds"] > 0 and row["gops"] > 0 for row in result["rows"])


def test_the_peers_of_the_command_line_are_those_that_are_measured():
    assert list(bench_layers.PEERS) == bench.PEERS


def test_ggml_layer():
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    from qat.bench.ggml import GgmlLinear

    torch.manual_seed(0)
    w, x = torch.randint(-1, 2, (64, 512)).float(), torch.randn(3, 512)
    torch.manual_seed(0)
    y = GgmlLinear(64, 512, "TQ2_0")(x)
    assert (y - x @ w.t()).norm() / (x @ w.t()).norm() < 0.02
