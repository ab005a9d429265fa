"""The .pt2 file as a format of `python -m qat.export`: `qat.formats.pt2.program` writes it, another process reads it back.

The reader has neither transformers nor the model's code, only torch and qat.ops. `exported` runs the operations of the packed
model in its order and gave its logits to the bit (glassllm; small Llama, Qwen2, Gemma 2, GPT-2). `compiled` fuses and reorders
floating point: where rounding moves an activation over the border between two int8 codes, later layers see it, and the logits of
glassllm were 3e-3 off. Its tolerances are those of the stock folder, whose autobitlinear does the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.formats.bitnet.verify import TOLERANCE as STOCK
from qat.formats.bitnet.verify import window_request
from qat.formats.pt2 import program as aoti
from qat.formats.tensors import quantized_layers
from qat.metrics.agreement import beyond, relative_error
from qat.metrics.perplexity import Window, exp_mean, log_likelihood, logits_of

OPTIONS = ("kind",)
TOLERANCE = {
    "exported": {"logits": 1e-5, "perplexity": 1e-5},
    "compiled": {"logits": STOCK["logits"], "perplexity": STOCK["perplexity"]},
}
READER = Path(__file__).with_name("reader.py")


def unsupported(model: nn.Module) -> str | None:
    """Why the format cannot hold this model (packed, or with BitLinear layers), as far as is known before it is traced."""
    return None if quantized_layers(model) else f"{type(model).__name__} has no quantized layers"


def save(
    model: nn.Module,
    file: str | Path,
    tokenizer: Any = None,
    *,
    kind: str = "exported",
    card: Mapping[str, Any] | None = None,
    check: Callable[[Path], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Write a packed causal language model as a function from token ids to logits; `tokenizer` and `card` have no place in it.

    Args:
        file: NAME.pt2; replaced if an earlier export wrote it.
        kind: of `qat.formats.pt2.program.KINDS`.
        check: called with the finished file before it gets its name, such as `verify`; if it raises, nothing is left.

    Returns:
        {"file", "kind", "bytes", "verification": what `check` returned}.

    Raises:
        ValueError: as `qat.formats.pt2.program.save`.
    """
    if reason := unsupported(model):
        raise ValueError(f"the pt2 format cannot hold this model: {reason}")
    found: dict[str, float] = {}
    target = aoti.save(model, file, kind=kind, check=None if check is None else lambda new: found.update(check(new)))
    return {"file": str(file), "kind": kind, "bytes": target.stat().st_size, "verification": found}


def verify(file: str | Path, model: nn.Module, probe_ids: Tensor, windows: Sequence[Window]) -> dict[str, float]:
    """Run a file in a process without transformers, and compare it with the packed model that it was written from.

    Args:
        probe_ids: int64 [B, T], tokens whose logits are compared.
        windows: of `qat.metrics.perplexity.windows`.

    Returns:
        `perplexity` (as read back), `perplexity_packed`, `perplexity_difference` (relative), `logits_difference` (relative
        Frobenius norm).

    Raises:
        ValueError: the reader fails, or a difference is above TOLERANCE; the numbers are named.
    """
    windows = list(windows)
    answer = _ask(Path(file), {"probe_ids": probe_ids.cpu().clone().contiguous(), **window_request(windows)})
    total, count = answer["nll"].tolist()
    found = {"perplexity": exp_mean(total, int(count)), "perplexity_packed": exp_mean(*log_likelihood(model, windows))}
    found["perplexity_difference"] = abs(found["perplexity"] / found["perplexity_packed"] - 1)
    found["logits_difference"] = relative_error(answer["logits"], logits_of(model, probe_ids).cpu())
    wrong = [f"{what} differ {how}" for what, how in beyond(found, TOLERANCE[aoti.kind_of(Path(file))]).items()]
    if wrong:
        raise ValueError(f"the .pt2 file is not the model that was packed: {', '.join(wrong)}")
    return found


def _ask(file: Path, request: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run the reader; ValueError with its last line if it fails."""
    path = os.pathsep.join(filter(None, [str(READER.parents[3]), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="qat-verify-") as scratch:
        asked, answered = Path(scratch, "request"), Path(scratch, "result")
        save_file(dict(request), asked)
        command = [sys.executable, "-P", str(READER), str(file.absolute()), str(asked), str(answered)]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ValueError(f"{file} cannot be run without transformers: {lines[-1]}")
        return load_file(answered)


def report(info: Mapping[str, Any]) -> list[str]:
    """Lines for people about what `save` returned for the verb."""
    found = info["verification"]
    return [
        f"wrote {info['file']} ({info['kind']}, {info['bytes']:,} bytes)",
        f"run in a process without transformers, on {info['text']}: perplexity {found['perplexity']:.6g}, packed"
        f" {found['perplexity_packed']:.6g} (relative difference {found['perplexity_difference']:.1e}); logits differ by"
        f" {found['logits_difference']:.1e}",
    ]
