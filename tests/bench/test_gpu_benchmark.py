"""benchmarks/gpu runs: every table at tiny sizes on the CPU, so that its first run on a GPU fails for no silly reason."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import checks, llama, operations, peers, rows, sections, step, timing

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
    names = ["reference", "chain", "decode", "prefill", "training", "quantizers", "stack", "profile", "parts"]
    assert [section.name for section in found][: len(names)] == names
    parts = [sections.PARTS.index(section.part) for section in found]
    assert parts == sorted(parts) and set(parts) == {0, 1, 2}
    assert all(section.part == "compiled" for section in found if "compile" in section.name)
    assert sum(section.seconds for section in found if section.part != "compiled") <= 7 * 60


def test_peers_that_are_compiled_wait_for_a_section_of_their_own(bench):
    shown = {}
    for late in (False, True):
        found = operations.linears(replace(bench, late=late), [(64, 96)], [1])
        found += operations.training(replace(bench, late=late), [(32, 64)], 8)
        shown[late] = {row.what for row in found}
    assert shown[False] & shown[True] == {operations.BASELINE}
    assert {"qat 2bit", "qat backward=input", "torch._int_mm, raw, 32 rows"} <= shown[False]
    assert {"fake-quant, torch.compile", "transformers AutoBitLinear, online"} <= shown[True]


def test_results_are_compared_before_they_are_timed(bench):
    own = replace(bench, done=[])
    found = checks.reference(own, [(40, 96)], (1, 5), 7)
    assert [(row.what, row.tokens) for row in found] == [("packed layer", 1), ("packed layer", 5), ("training layer", 7)]
    assert all(row.note.startswith("equal to the bit") for row in found), [row.note for row in found]
    one, other = torch.ones(3), torch.tensor([1.0, 1.5, 1.0])
    assert checks.compared([one], [other]) == "WRONG: 1 of 3 values differ, by up to 0.5"
    assert checks.compared([one], [other.double()]).startswith("WRONG: another dtype")
    (broken,) = checks.reference(replace(bench, done=[]), [(40, -96)], (), 7)
    assert broken.note.startswith("failed")


def test_a_chain_is_compared_and_timed(bench):
    found = checks.chain(replace(bench, done=[]), [64], layers=3, inputs=4)
    assert [row.note[:16] for row in found[:2]] == ["equal to the bit"] * 2
    assert {row.what for row in found[2:]} == {checks.WAITING, checks.OVERLAPPING}
    measured(found[2:])


def test_a_profile_names_kernels(bench):
    found = checks.profile(replace(bench, done=[]), 64, 96, (1, 40))
    assert {row.tokens for row in found} == {1, 40} and "qat::cpu_linear" in found[0].what
    assert all(row.microseconds > 0 and row.note == "10 calls" for row in found)


def test_every_section_has_rows_whatever_its_budget(bench, monkeypatch):
    """At tiny sizes, with a budget for all and with none: no table is missing, and none stops the next."""
    tiny = [(64, 96)]
    for module in (sections, operations):
        for name in ("BITNET_2B", "TRAINING_SHAPES", "ACTIVATION_SHAPES"):
            monkeypatch.setattr(module, name, tiny, raising=False)
        monkeypatch.setattr(module, "WEIGHT_SHAPE", (64, 96), raising=False)
    monkeypatch.setattr(sections, "TOKENS", 24)
    monkeypatch.setattr(sections, "CHAIN", ((64,), 2, 3))
    chosen = [one for one in sections.sections([]) if one.part != "step"]
    found = dict(zip([one.name for one in chosen], sections.measured(bench, chosen), strict=True))
    assert all(found.values()) and {row.tokens for row in found["prefill"]} == {512, 2048}
    assert not [row.note for some in found.values() for row in some if "failed" in row.note or "WRONG" in row.note]
    late = [replace(one, seconds=-1.0) for one in chosen]
    for one, some in zip(late, sections.measured(bench, late), strict=True):
        assert some and all(row.note or row.microseconds for row in some), one.name


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


@pytest.mark.parametrize("seconds", ["6", "0"])
def test_the_script_ends_in_its_time_and_names_what_it_left_out(tmp_path, seconds):
    (tmp_path / "python").write_text("#!/bin/sh\n[ $1 = -c ] || exec sleep 60\n")
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path), "QAT_GPU_SECONDS": seconds}
    command = [ROOT / "benchmarks" / "gpu.sh", "operations", "step"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == (1 if seconds == "6" else 0)
    assert ("operations FAILED, or was ended at its limit" in done.stdout) == (seconds == "6")
    assert "step is left out: the time is over" in done.stdout


def functions(text: str) -> set[tuple[str, ...]]:
    """(result, name, types of arguments) of what stands at the beginning of lines."""
    found = re.findall(r"^(int|int64_t|bool) (\w+)\((.*?)\)", re.sub("//.*", "", text), re.MULTILINE | re.DOTALL)
    return {(result, name, *[re.sub(r" \w+$", "", one) for one in re.split(r",\s*", rest)]) for result, name, rest in found}


def test_the_kernels_that_do_nothing_are_all_there_are():
    """One more would be missing only when `benchmarks.gpu.calls --gpu` loads them."""
    declared = functions((ROOT / "csrc" / "cuda" / "kernels.h").read_text())
    assert len(declared) >= 12 and ("int64_t", "partial_bytes", "const Linear&") in declared
    assert functions((ROOT / "benchmarks" / "gpu" / "nothing.cpp").read_text()) == declared
