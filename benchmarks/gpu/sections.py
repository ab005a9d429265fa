"""The tables as sections in the order of what is needed first, each with a budget of seconds: a GPU may be there for minutes.

Whether results are right is said before how fast they come, and what torch compiles for a minute comes last. A section that is
over its budget names the rows that it leaves out; one that fails is a row that says so, and the next begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.gpu import checks, operations, step
from benchmarks.gpu.llama import SIZES
from benchmarks.gpu.operations import ACTIVATION_SHAPES, BITNET_2B, TRAINING_SHAPES, WEIGHT_SHAPE
from benchmarks.gpu.rows import Bench, Row, line, say

TOKENS = 8192
"""Of a training layer."""
CHAIN = ((256, 2560), 30, 100)
"""Widths, layers and inputs."""
IN_PARTS = [(576, 1536), (512, 2048), (2048, 8192)]
"""N, K of a 135M and a 1B model whose tiles are too few for a device at 64 to 256 tokens, not at 1,024 (csrc/cuda/plan.cu)."""
PARTS = ("operations", "step", "compiled")
STEPS = {"SmolLM2-135M": (16, 512), "SmolLM2-360M": (16, 512), "Llama-3.2-1B": (8, 1024)}
"""Model -> sequences and tokens of a batch."""


@dataclass(frozen=True)
class Section:
    """Tables that are measured within `seconds`, and belong to `part` of the command line."""

    name: str
    part: str
    words: str
    seconds: float
    rows: Callable[[Bench], Sequence[Row]]
    late: bool | None = None
    """See `Bench`."""


def sections(models: Sequence[str]) -> list[Section]:
    """All of them, at full size, the step on these models."""
    share = "share of the copy bandwidth or matmul rate that was measured here, by each row's own bytes and operations"

    def linears(*tokens: int, shapes: Sequence[tuple[int, int]] = BITNET_2B) -> Callable[[Bench], Sequence[Row]]:
        return lambda bench: operations.linears(bench, shapes, tokens)

    tables = {
        "decode": (f"decode: speed against cuBLAS bf16; {share}", linears(1, 4, 16)),
        "prefill": (f"prefill: speed against cuBLAS bf16; {share}", linears(512, 2048)),
        "training": ("training layer, forward + backward: speed against a bf16 nn.Linear", _training),
    }
    return [
        Section("reference", "operations", "results beside the reference's", 30, _reference),
        Section("chain", "operations", "layers for one token, launched before the one ahead has ended", 20, _chain),
        *(Section(name, "operations", text, 45, rows, late=False) for name, (text, rows) in tables.items()),
        Section("quantizers", "operations", "quantizers: speed against torch.compile", 40, _quantizers),
        Section("stack", "operations", "all linears of BitNet-2B for one token", 20, _stack),
        Section("profile", "operations", "kernels of decode and of prefill", 10, _profile),
        Section(
            "parts", "operations", f"K in parts: {tables['prefill'][0]}", 30, linears(64, 256, 1024, shapes=IN_PARTS), late=False
        ),
        *(_step(name, False, 45) for name in models),
        *(Section(f"{name}, compiled", "compiled", text, 60, rows, late=True) for name, (text, rows) in tables.items()),
        *(_step(name, True, 120) for name in models),
    ]


def _reference(bench: Bench) -> list[Row]:
    return checks.reference(bench, BITNET_2B, (1, 16, 512, 2048), 2048)


def _chain(bench: Bench) -> list[Row]:
    return checks.chain(bench, *CHAIN)


def _profile(bench: Bench) -> list[Row]:
    return checks.profile(bench, *WEIGHT_SHAPE, (1, 2048))


def _training(bench: Bench) -> list[Row]:
    return operations.training(bench, TRAINING_SHAPES, TOKENS)


def _stack(bench: Bench) -> list[Row]:
    return operations.stack(bench, BITNET_2B, CHAIN[1])


def _quantizers(bench: Bench) -> list[Row]:
    return operations.activations(bench, ACTIVATION_SHAPES) + operations.weights(bench, *WEIGHT_SHAPE)


def _step(model: str, compiled: bool, seconds: float) -> Section:
    ways = [way for way, (compile, _) in step.WAYS.items() if compile == compiled]
    words = f"training step of {model}, {', '.join(ways)}: speed against the plain model"
    name = f"step {model}{', torch.compile' if compiled else ''}"
    return Section(
        name,
        "compiled" if compiled else "step",
        words,
        seconds,
        lambda bench: step.steps(bench, model, SIZES[model], *STEPS[model], ways),
    )


def measured(bench: Bench, chosen: Sequence[Section]) -> Iterator[list[Row]]:
    """The rows of each section when it is over."""
    for section in chosen:
        say(section.words)
        begun = time.perf_counter()
        rows: list[Row] = []
        own = replace(bench, until=begun + section.seconds, late=section.late, done=rows)
        try:
            section.rows(own)
        except Exception as error:  # what is no row's: a layer that cannot be made, memory that is not there
            why = str(error).strip().partition("\n")[0][:120] or type(error).__name__
            rows.append(Row(section.name, "", 0, section.name, note=f"failed: {why}"))
            print(line(rows[-1]), flush=True)
        print(f"{section.name}: {time.perf_counter() - begun:.0f} of {section.seconds:.0f} s", flush=True)
        yield rows
