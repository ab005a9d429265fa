"""A packed model as a .pt2 file: the same numbers as the model, in a process that never imports transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import qat
from qat.formats.pt2 import program as aoti
from qat.inference import tiles as inference
from qat.ops import cpu
from qat.ops.build import cpu as build_cpu

RUN = """
import sys, torch
from qat.export import aoti
run, ids = aoti.load(sys.argv[1]), torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(run(ids), sys.argv[3])
assert not any(name.split(".")[0] in ("transformers", "lightning") for name in sys.modules)
"""


RUN_BARE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
with torch.no_grad():
    y = torch._inductor.aoti_load_package(sys.argv[2])(torch.load(sys.argv[3], weights_only=True))
torch.save(y, sys.argv[4])
assert "qat" not in sys.modules
"""


def packed_stack() -> nn.Sequential:
    torch.manual_seed(0)
    stack = nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 33, bias=False)).requires_grad_(False)
    qat.convert(stack, qat.QuantConfig(granularity="channel"))
    qat.pack(stack, layout="base3")
    return stack.eval()


def run_elsewhere(file: Path, x: torch.Tensor, folder: Path) -> torch.Tensor:
    torch.save(x, folder / "x.pt")
    arguments = [sys.executable, "-c", RUN, str(file), str(folder / "x.pt"), str(folder / "y.pt")]
    done = subprocess.run(arguments, cwd=Path(qat.__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "y.pt", weights_only=True)


def test_a_language_model_runs_without_transformers(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval().requires_grad_(False)
    qat.convert(model, qat.QuantConfig())
    qat.pack(model)
    file = aoti.save(model, tmp_path / "model.pt2")
    ids = torch.randint(31, (3, 17))
    expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(run_elsewhere(file, ids, tmp_path), expected, rtol=1e-5, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind", aoti.KINDS)
def test_a_stack_of_layers_in_either_kind(kind, tmp_path):
    stack = packed_stack()
    file = aoti.save(stack, tmp_path / "stack.pt2", kind=kind, example=torch.zeros(2, 3, 48))
    for shape in ((2, 3, 48), (1, 7, 48)):
        x = torch.randn(shape)
        torch.testing.assert_close(run_elsewhere(file, x, tmp_path), stack(x), rtol=0, atol=0)


@pytest.mark.skipif(not cpu.compiled(), reason=f"no compiled kernels: {cpu.status().why}")
def test_a_tiled_stack_needs_only_torch_and_the_library_of_kernels(tmp_path):
    stack, x = packed_stack(), torch.randn(2, 5, 48)
    expected = stack(x)
    inference.tile(stack)
    file = aoti.save(stack, tmp_path / "tiled.pt2", kind="compiled", example=torch.zeros(2, 3, 48))
    torch.save(x, tmp_path / "x.pt")
    arguments = [str(build_cpu.load()[0]), str(file), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    done = subprocess.run([sys.executable, "-c", RUN_BARE, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), expected)


def test_the_codes_stay_packed_in_the_file(tmp_path):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(1024, 1024, bias=False)).requires_grad_(False)
    qat.convert(layer, qat.QuantConfig())
    qat.pack(layer)
    file = aoti.save(layer, tmp_path / "layer.pt2", example=torch.zeros(2, 2, 1024))
    assert file.stat().st_size < 1.2 * 1024 * 1024 / 4 + 50_000


def test_what_it_refuses(tmp_path):
    with pytest.raises(ValueError, match="no packed layers"):
        aoti.save(nn.Linear(4, 4), tmp_path / "a.pt2", example=torch.zeros(2, 2, 4))
    with pytest.raises(ValueError, match="exported, compiled"):
        aoti.save(packed_stack(), tmp_path / "a.pt2", kind="onnx")
    with pytest.raises(ValueError, match="must end in .pt2"):
        aoti.save(packed_stack(), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="is missing"):
        aoti.load(tmp_path / "none.pt2")
    (tmp_path / "bad.pt2").write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(ValueError, match="no .pt2 file"):
        aoti.load(tmp_path / "bad.pt2")


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aoti.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    layer = qat.PackedBitLinear.from_bitlinear(qat.BitLinear(32, 16))
    with pytest.raises(ValueError, match="cannot write x.pt2: it needs .* bytes, and the disk has 1,000"):
        aoti.save(nn.Sequential(layer), tmp_path / "x.pt2", example=torch.zeros(2, 3, 32))
    assert list(tmp_path.iterdir()) == []
