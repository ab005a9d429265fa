"""benchmarks/gpu runs: every table at tiny sizes on the CPU, so that its first run on a GPU fails for no silly reason."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import llama, operations, peers, rows, sections, step, timing

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch):
    """torch.compile of nothing: what is compiled is the peers' business, and takes minutes here."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    peers.compiled.cache_clear()
    yield
    peers.compiled.cache_clear()


@pytest.fixture(scope="module")
def bench():
    ceilings = timing.Ceilings.measure(CPU, 0.0, copy_bytes=1 << 16, width=64)
    assert ceilings.bytes_per_second > 0 and ceilings.bf16 > 0 and "TB/s" in ceilings.line()
    return rows.Bench(CPU, ceilings, 0.0, 1 << 12)


def measured(found: list[rows.Row]) -> dict[str, rows.Row]:
    for row in found:
        assert row.microseconds is not None and row.microseconds > 0, rows.line(row)
        assert row.what in rows.line(row)
    return {row.what: row for row in found}


def test_floor():
    ceilings = timing.Ceilings(bytes_per_second=4e12, bf16=800e12, int8=1600e12)
    assert ceilings.floor(4e6, 0, False) == pytest.approx(1.0)
    assert ceilings.floor(4e6, 1600e6, False) == pytest.approx(2.0)
    assert ceilings.floor(4e6, 3200e6, True) == pytest.approx(2.0)


def test_copies_outrun_the_cache(bench):
    assert bench.copies(1 << 12) == 5 and bench.copies(1 << 20) == 1 and bench.copies(1) == 256


def test_linears(bench):
    found = operations.linears(bench, [(64, 96)], [1, 40])
    assert {(row.table, row.tokens) for row in found} == {("decode", 1), ("prefill", 40)}
    decode = measured([row for row in found if row.table == "decode"])
    assert decode[operations.BASELINE].speedup == 1.0
    assert decode["qat 2bit"].speedup == pytest.approx(decode[operations.BASELINE].microseconds / decode["qat 2bit"].microseconds)
    assert {"qat base3", "torch._int_mm, raw, 32 rows", "transformers AutoBitLinear, offline"} <= set(decode)
    assert all(row.share > 0 for row in found)


def test_cold_calls_have_weights_of_their_own(bench):
    peer = operations.linear_peers(bench, 64, 96, 1, cold=True)["qat 2bit"]
    calls = peer.make()
    assert len(calls) == bench.copies(64 * 96 / 4) > 5
    assert len({call.func.packed.data_ptr() for call in calls}) == len(calls)


def test_stack_quantizers_and_training(bench):
    assert set(measured(operations.stack(bench, [(64, 96), (96, 64)], 2))) == {"qat 2bit", operations.BASELINE}
    assert "qat quantize_activation" in measured(operations.activations(bench, [(8, 64)]))
    assert {"qat to int8, a tensor", "qat to int8, a channel"} <= set(measured(operations.weights(bench, 24, 64)))
    training = measured(operations.training(bench, [(32, 64)], 8))
    assert {"qat backward=int8", "fake-quant, eager", "transformers AutoBitLinear, online"} <= set(training)


def test_step(bench):
    size = llama.Size(vocabulary=50, hidden=32, layers=2, heads=4, kv_heads=2, mlp=48)
    found = measured(step.steps(bench, "tiny", size, batch=2, context=8))
    assert len(found) == len(step.WAYS) * len(step.VARIANTS)
    assert all(row.note.endswith("tokens/s") for row in found.values())
    ids = torch.randint(50, (2, 8))
    for name, change in step.VARIANTS.items():
        (run,) = step.step(size, change, ids, compile=False)
        losses = [run().item() for _ in range(30)]
        assert losses[-1] < losses[0], f"{name} does not learn"


def test_a_peer_that_is_missing_or_fails_is_a_row(bench, capsys):
    def missing() -> list[timing.Call]:
        raise ImportError("No module named 'nowhere'", name="nowhere")

    def failing() -> list[timing.Call]:
        raise RuntimeError("first line\nsecond line")

    made = {"a": rows.Peer(missing), "b": rows.Peer(failing), "c": rows.Peer(lambda: [lambda: None])}
    a, b, c = bench.table("table", "1x1", 1, made, "c")
    assert (a.note, b.note, c.speedup) == ("not installed: nowhere", "failed: first line", 1.0)
    out = capsys.readouterr().out
    assert "not installed: nowhere" in out and "failed: first line" in out
    assert bench.table("table", "1x1", 1, made, "a")[2].speedup is None


def test_sections_end_in_time_and_one_that_fails_hides_no_other(bench, capsys):
    def failing(bench: rows.Bench) -> list[rows.Row]:
        bench.table("table", "1x1", 1, {"a": rows.Peer(lambda: [lambda: None])}, "a")
        raise RuntimeError("no memory\nat all")

    def late(bench: rows.Bench) -> list[rows.Row]:
        return bench.table("table", "2x2", 1, {"b": rows.Peer(lambda: [lambda: None])}, "b")

    chosen = [
        sections.Section("first", "operations", "first of all", 60.0, failing),
        sections.Section("second", "operations", "then", -1.0, late),
        sections.Section("third", "operations", "at last", 60.0, late),
    ]
    first, second, third = sections.measured(bench, chosen)
    assert [row.what for row in first] == ["a", "first"] and first[0].microseconds is not None
    assert first[1].note == "failed: no memory" and second[0].note == "left out: the section's time is over"
    assert third[0].microseconds is not None
    assert "first of all" in capsys.readouterr().out


def test_facts_come_before_what_takes_a_minute_to_compile():
    found = sections.sections(list(sections.STEPS))
    assert [section.name for section in found][:3] == ["decode", "prefill", "training"]
    compiled = ["torch.compile" in section.words and section.part == "step" for section in found]
    assert compiled == sorted(compiled) and any(compiled)
    assert sum(section.seconds for section in found if not compiled[found.index(section)]) <= 8 * 60


def test_auto_bit_linear_of_older_transformers(monkeypatch):
    """They ignore dtype and device, and would multiply bfloat16 by float32."""
    bitnet = pytest.importorskip("transformers.integrations.bitnet")

    class Older(bitnet.AutoBitLinear):
        def __init__(self, *sizes, device=None, dtype=None, **options):
            super().__init__(*sizes, **options)

    monkeypatch.setattr(bitnet, "AutoBitLinear", Older)
    layer = peers.auto_bit_linear(8, 16, False, CPU, torch.bfloat16)
    assert layer(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_script_and_its_module_say_what_they_need():
    done = subprocess.run(["bash", "-n", ROOT / "benchmarks" / "gpu.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    unknown = subprocess.run([ROOT / "benchmarks" / "gpu.sh", "everything"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2 and "unknown part everything" in unknown.stdout
