"""Run a .pt2 file in a process without transformers, and compare it with the packed model that it was written from.

`exported` runs the operations of the packed model in its order and gave its logits to the bit (glassllm; small Llama, Qwen2,
Gemma 2, GPT-2). `compiled` fuses and reorders floating point: where rounding moves an activation over the border between two int8
codes, later layers see it, and the logits of glassllm were 3e-3 off. Its tolerances are those of the stock folder, whose
autobitlinear does the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.formats.bitnet.read_back import TOLERANCE as STOCK
from qat.formats.bitnet.read_back import window_request
from qat.formats.pt2 import program as aoti
from qat.formats.reader import Reader
from qat.metrics.agreement import beyond, relative_error
from qat.metrics.perplexity import Window, exp_mean, log_likelihood, logits_of

TOLERANCE = {
    "exported": {"logits": 1e-5, "perplexity": 1e-5},
    "compiled": {"logits": STOCK["logits"], "perplexity": STOCK["perplexity"]},
}
READER = Reader(Path(__file__).with_name("reader.py"), "{} cannot be run without transformers", sees_qat=True)


def read_back(
    file: str | Path,
    model: nn.Module,
    probe_ids: Tensor,
    windows: Sequence[Window],
    *,
    further: Mapping[str, Sequence[Window]] | None = None,
) -> dict[str, Any]:
    """Run a file in a process without transformers, and compare it with the packed model that it was written from.

    Args:
        probe_ids: int64 [B, T], tokens whose logits are compared.
        windows: of `qat.metrics.perplexity.windows`.
        further: name -> windows of texts whose perplexity is measured as read back, and not compared.

    Returns:
        `perplexity` (as read back), `perplexity_packed`, `perplexity_difference` (relative), `logits_difference` (relative
        Frobenius norm), and `further`: name -> perplexity, where such texts were given.

    Raises:
        ValueError: the reader fails, or a difference is above TOLERANCE; the numbers are named.
    """
    windows = list(windows)
    request = {"probe_ids": probe_ids.cpu().clone().contiguous(), **window_request(windows)}
    for i, others in enumerate((further or {}).values()):
        request |= window_request(others, f"text.{i}.")
    answer = READER.ask(file, lambda asked: save_file(request, asked), load_file)
    found: dict[str, Any] = {"perplexity": _perplexity(answer["nll"])}
    found["perplexity_packed"] = exp_mean(*log_likelihood(model, windows))
    found["perplexity_difference"] = abs(found["perplexity"] / found["perplexity_packed"] - 1)
    found["logits_difference"] = relative_error(answer["logits"], logits_of(model, probe_ids).cpu())
    wrong = [f"{what} differ {how}" for what, how in beyond(found, TOLERANCE[aoti.kind_of(Path(file))]).items()]
    if wrong:
        raise ValueError(f"the .pt2 file is not the model that was packed: {', '.join(wrong)}")
    if further:
        found["further"] = {name: _perplexity(answer[f"text.{i}.nll"]) for i, name in enumerate(further)}
    return found


def _perplexity(nll: Tensor) -> float:
    total, count = nll.tolist()
    return exp_mean(total, int(count))


def report(info: Mapping[str, Any]) -> list[str]:
    """Lines for people about what `qat.formats.pt2.writing.save` returned for the verb."""
    found = info["verification"]
    return [
        f"wrote {info['file']} ({info['kind']}, {info['bytes']:,} bytes)",
        f"run in a process without transformers, on {info['text']}: perplexity {found['perplexity']:.6g}, packed"
        f" {found['perplexity_packed']:.6g} (relative difference {found['perplexity_difference']:.1e}); logits differ by"
        f" {found['logits_difference']:.1e}",
    ]


def recorded(info: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What a run notes of it: facts for its result, and lines for people."""
    found = info["verification"]
    same = found["logits_difference"] == 0 and found["perplexity_difference"] == 0
    how = "equal to the bit" if same else f"logits {found['logits_difference']:.1e} off"
    line = f"{Path(info['file']).name} = packed: torch without transformers gives perplexity {found['perplexity']:.4f}, {how}"
    return dict(found), [line]
