"""Bytes of a training on one device with less memory, and what that does to codes: `python benchmarks/memory.py [--steps 60]`.

Each row trains the same model on the same batches; what is counted: optimizer state and teacher after the last step, what
autograd saves for a batch, codes that differ from those of float32 AdamW (and, for scale, from those of other batches).
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.config import DistillConfig, ModelConfig, OptimConfig, QuantConfig
from qat.conversion import walker
from qat.conversion.layers import bitlinears
from qat.models.hub import load_model, load_tokenizer
from qat.planning.choosing import state_bytes
from qat.planning.facts import saved_bytes
from qat.training.gradients.clipping import clip
from qat.training.gradients.groups import parameter_groups
from qat.training.gradients.offloaded import OffloadedAdamW
from qat.training.module import QATModule


@dataclass(frozen=True)
class Row:
    """What differs from float32 AdamW with a float32 teacher."""

    name: str
    optimizer: str = "AdamW"
    teacher: torch.dtype = torch.float32
    checkpointing: bool = False
    seed: int = 0


ROWS = (
    Row("AdamW in float32"),
    Row("AdamW in 8 bits", "AdamW8bit"),
    Row("AdamW, moments in the CPU's memory", "OffloadedAdamW"),
    Row("teacher in bfloat16", teacher=torch.bfloat16),
    Row("activation checkpointing", checkpointing=True),
    Row("8 bits, bfloat16 and checkpointing", "AdamW8bit", teacher=torch.bfloat16, checkpointing=True),
    Row("AdamW in float32, other batches", seed=1),
)


def optimizer(row: Row) -> Any:
    """Its factory of parameter groups."""
    from qat.training.gradients.eight_bits import AdamW8bit

    kind: Any = {"AdamW": torch.optim.AdamW, "AdamW8bit": AdamW8bit, "OffloadedAdamW": OffloadedAdamW}[row.optimizer]
    return lambda groups: kind(groups, betas=(0.9, 0.95))


def trained(row: Row, base: nn.Module, tokens: Tensor, steps: int) -> tuple[nn.Module, dict[str, float]]:
    """The student after so many steps of batches [4, 128] at 1e-3, and what was counted."""
    torch.manual_seed(0)
    student, teacher = copy.deepcopy(base).train(), copy.deepcopy(base)
    for parameter in teacher.parameters():
        parameter.data = parameter.data.to(row.teacher)
    walker.convert(student, QuantConfig())
    if row.checkpointing:
        student.activation_checkpointing_enable()  # type: ignore[operator]
    optim, factory = OptimConfig(lr=1e-3), optimizer(row)
    module = QATModule(student, DistillConfig(ce=0.5, kl=0.5), optim, factory, steps, teacher)
    stepper, order = factory(parameter_groups(student, optim)), torch.Generator().manual_seed(row.seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 128, (4,), generator=order)
        ids = torch.stack([tokens[start : start + 128] for start in starts])
        pairs = module.pairs({"input_ids": ids, "labels": ids})
        loss = module.loss({name: total for name, (total, _) in pairs.items()}, ids.numel())
        loss.backward()
        clip((p for group in stepper.param_groups for p in group["params"]), 1.0)
        stepper.step()
        stepper.zero_grad()
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    counted = {
        "state": 0 if getattr(stepper, "rests", False) else sum(_state(stepper)),
        "teacher": sum(p.nbytes for p in teacher.parameters()),
    }
    return student, {**counted, "saved": saved_bytes(student, batch), "loss": float(loss), "each": state_bytes(factory)}


def _state(stepper: Any) -> list[int]:
    moments = [value for state in stepper.state_dict()["state"].values() for value in state.values()]
    tensors = [one for value in moments for one in (value.values() if isinstance(value, dict) else [value])]
    return [one.nbytes for one in tensors if isinstance(one, Tensor)]


def codes(student: nn.Module) -> Tensor:
    """Of all layers, int8 [N]."""
    return torch.cat([layer.quantized()[0].flatten() for _, layer in bitlinears(student)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="../shared/models/stories260k")
    parser.add_argument("--text", default="../shared/data/tinystories/train.txt")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, nargs="*", help="which, from 0, beside the first; all of them where nothing is said")
    args = parser.parse_args()
    config = ModelConfig(path=args.model)
    base = load_model(config)
    ids = load_tokenizer(config)(Path(args.text).read_text(encoding="utf-8")[:2_000_000])["input_ids"]
    tokens, first = torch.tensor(ids), None
    print("| what | optimizer state | bytes a parameter | teacher | saved for backward | codes that differ | loss |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in ROWS if args.rows is None else [ROWS[0], *(ROWS[number] for number in args.rows)]:
        student, found = trained(row, base, tokens, args.steps)
        mine = codes(student)
        first = mine if first is None else first
        share = (mine != first).float().mean().item()
        sizes = " | ".join(f"{found[name] / 2**20:.2f} MiB" for name in ("teacher", "saved"))
        state = f"{found['state'] / 2**20:.2f} MiB | {found['each']:.2f}"
        print(f"| {row.name} | {state} | {sizes} | {share:.2%} | {found['loss']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
