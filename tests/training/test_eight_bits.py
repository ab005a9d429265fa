"""Less memory on one device: moments in 8 bits and a teacher in bfloat16, in real runs that resume, and what is refused."""

from __future__ import annotations

import builtins
import copy
import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import losses, stop_after
from torch import nn

from qat.config import DistillConfig, ModelConfig, TrainConfig
from qat.config.compose.composing import compose_run
from qat.config.compose.saved import load_config
from qat.models.hub import load_model
from qat.planning.choosing import state_bytes
from qat.planning.remedies import EIGHT_BITS
from qat.train import run
from qat.training.checkpoints import read_step
from qat.training.plugins import optimizer_factory
from qat.training.trainings import load_teacher

ROOT = Path(__file__).resolve().parents[2]
NODE = {"_target_": "qat.training.gradients.eight_bits.AdamW8bit", "betas": [0.9, 0.95]}


def eight(config: TrainConfig) -> TrainConfig:
    pytest.importorskip("torchao")
    return replace(config, optim=replace(config.optim, optimizer=dict(NODE)))


def test_two_bytes_a_parameter(config: TrainConfig) -> None:
    factory = optimizer_factory(eight(config))
    assert EIGHT_BITS <= state_bytes(factory) <= EIGHT_BITS + 2 * 1024 / 256**2
    assert compose_run(["recipe=plain", "model.path=m", "data.train=t", "optim=adamw_8bit"]).optim.optimizer == NODE


def test_its_state_is_plain_tensors_and_comes_back(config: TrainConfig) -> None:
    factory, twins = optimizer_factory(eight(config)), []
    for _ in range(2):
        torch.manual_seed(1)
        weight = nn.Parameter(torch.randn(64, 64))
        twins.append((weight, factory([{"params": [weight], "lr": 1e-2, "weight_decay": 0.1}])))
    (mine, first), (other, second) = twins
    step(mine, first, 0)
    state = first.state_dict()
    kinds = {type(part) for moments in state["state"].values() for one in moments.values() for part in parts(one)}
    assert kinds == {torch.Tensor, bool} and isinstance(state["param_groups"][0]["lr"], float)
    other.data.copy_(mine.data)
    second.load_state_dict(copy.deepcopy(state))
    for optimizer in (first, second):
        optimizer.param_groups[0]["lr"] = 5e-3  # as a schedule that is resumed sets it
    for seed in (1, 2):
        step(mine, first, seed)
        step(other, second, seed)
    assert torch.equal(mine, other)


def parts(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else [value]


def step(weight: nn.Parameter, optimizer: torch.optim.Optimizer, seed: int) -> None:
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


def test_a_run_with_it_and_a_teacher_in_half_resumes_to_the_same_losses(config: TrainConfig, tmp_path: Path) -> None:
    config = eight(config)
    config.model.teacher_dtype = "bfloat16"
    whole = replace(config, run=replace(config.run, dir=str(tmp_path / "whole")))
    assert run(whole).status == "done"
    folder = Path(config.run.dir or "")
    stop_after(replace(config, trainer=replace(config.trainer, checkpoint_every=3)), 8)
    assert read_step(folder / "checkpoints/last.ckpt") == 6
    assert run(load_config(str(folder))).status == "done" and losses(folder) == losses(tmp_path / "whole")


def test_torchao_is_imported_where_it_is_asked_for_and_silently() -> None:
    """transformers would import it for a function that it takes of it, which is still the one that is called."""
    pytest.importorskip("torchao")
    code = """
import sys, qat, transformers.modeling_utils
from transformers.quantizers.quantizer_torchao import flatten_tensor_state_dict as flatten
print("torchao" in sys.modules)
import qat.training.gradients.eight_bits, torch
print("imported", file=sys.stderr)
print("torchao" in sys.modules, flatten({"a": torch.ones(1)})[1]["tensor_names"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == 'False\nTrue ["a"]\n' and done.stderr.startswith("imported\n"), done.stderr


def test_without_torchao_it_says_what_to_install(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    there, missing = builtins.__import__, "qat.training.gradients.eight_bits"

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError("No module named 'torchao'")
        return there(name, *rest, **more)

    monkeypatch.delitem(sys.modules, missing, raising=False)
    monkeypatch.delattr(missing, raising=False)  # else it is found as an attribute of its package
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"needs torchao: pip install qat-bitlinear\[torchao\]"):
        optimizer_factory(replace(config, optim=replace(config.optim, optimizer=dict(NODE))))
    monkeypatch.undo()
    if importlib.util.find_spec("torchao"):
        importlib.import_module(missing)


def test_it_is_refused_where_its_state_would_be_divided(config: TrainConfig) -> None:
    config = eight(config)
    config.trainer = replace(config.trainer, strategy="fsdp2")
    with pytest.raises(ValueError, match=r"AdamW8bit does not fit trainer.strategy=fsdp2"):
        optimizer_factory(config)


def test_a_shared_teacher_in_half_is_a_copy(tiny_model: Path) -> None:
    config = TrainConfig(model=ModelConfig(path=str(tiny_model), teacher_dtype="bfloat16"), distill=DistillConfig(ce=0.5, kl=0.5))
    base = load_model(config.model)
    teacher = load_teacher(config, base)
    assert teacher is not None and {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in base.parameters()} == {torch.float32} and {b.dtype for b in teacher.buffers()} == {torch.float32}
    assert load_teacher(replace(config, model=ModelConfig(path=str(tiny_model))), base) is base
    with pytest.raises(ValueError, match="model.teacher_dtype"):
        ModelConfig(teacher_dtype="int8")


def test_a_dry_run_counts_them_by_device(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run(replace(config, dry_run=True))
    plain = capsys.readouterr().out
    assert (
        "memory          about" in plain and "optimizer 0, teacher 0, codes for backward" in plain and "on the wire" not in plain
    )
