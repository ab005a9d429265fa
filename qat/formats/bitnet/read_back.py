"""Read an export back with the format's stock reader, and fail unless it is the model that was packed.

Three comparisons, each against the packed model in memory:

    layers       every quantized layer on the same input, so that one wrong row shows
    logits       of the whole model
    perplexity   on given windows of text

With `linear_class: bitlinear` our ops do operation by operation what the reader does, so in float32 all three were equal
to the bit (glassllm, stories260k). `autobitlinear` rescales in another order; where float32 rounding moves an activation
over the border between two int8 codes, later layers see it: logits were up to 5e-3 off, perplexity 3e-4 (untrained
models, 4,000 tokens). The tolerances below serve both, and other machines' libraries. Loading as bfloat16 rounds the
scales: it is measured and reported, never asserted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.conversion.layers import packed_layers
from qat.formats.code import is_custom
from qat.formats.reader import Reader
from qat.metrics.agreement import beyond, relative_error
from qat.metrics.perplexity import Window, exp_mean, log_likelihood, logits_of

READER = Reader(
    Path(__file__).with_name("stock_reader.py"),
    "stock transformers cannot read {}",
    environment={"TORCHDYNAMO_DISABLE": "1"},  # the stock unpacking is compiled otherwise: 19 s at its first call on a CPU
)
TOLERANCE = {"layers": 1e-5, "logits": 2e-2, "perplexity": 1e-3}
_LAYER_TOKENS = 4


def read_back(
    folder: str | Path,
    model: nn.Module,
    probe_ids: Tensor,
    windows: Sequence[Window],
    *,
    further: Mapping[str, Sequence[Window]] | None = None,
    bfloat16: bool = True,
) -> dict[str, Any]:
    """Compare a stock folder with the packed model that it was written from.

    Args:
        folder: what `hf.save` wrote.
        model: the packed model.
        probe_ids: int64 [B, T], tokens whose logits are compared.
        windows: of `qat.metrics.perplexity.windows`.
        further: name -> windows of texts whose perplexity is measured as read back, and not compared.
        bfloat16: measure the perplexity of the folder loaded as bfloat16, too.

    Returns:
        `perplexity` (as read back), `perplexity_packed`, `perplexity_difference` (relative), `logits_difference` and
        `layers_difference` (relative Frobenius norms; the largest of all layers), `perplexity_bfloat16`, `bfloat16_cast`:
        1.0 if the folder loaded with `dtype=bfloat16` runs only after a further `.to(torch.bfloat16)` (autobitlinear does), and
        `further`: name -> perplexity, where such texts were given.

    Raises:
        ValueError: the reader fails, or a difference is above TOLERANCE; the numbers are named.
    """
    windows = list(windows)
    model = _float32(model)
    inputs = _layer_inputs(model)
    request = _request(probe_ids, windows, inputs, _widths(folder, inputs))
    for i, others in enumerate((further or {}).values()):
        request |= window_request(others, f"text.{i}.")
    asked = {"device": str(_device(model)), "bfloat16": str(int(bfloat16)), "trust": str(int(is_custom(model)))}
    answer = READER.ask(folder, lambda file: save_file(request, file, asked), load_file)
    found: dict[str, Any] = {
        **_compare_perplexity(answer, model, windows),
        "logits_difference": relative_error(answer["logits"], logits_of(model, probe_ids.to(_device(model))).cpu()),
        "layers_difference": _compare_layers(answer, model, inputs),
    }
    _assert_equal(found)
    if further:
        found["further"] = {name: _perplexity(answer[f"text.{i}.nll"]) for i, name in enumerate(further)}
    return found


def _assert_equal(found: Mapping[str, float]) -> None:
    wrong = [f"{what} differ {how}" for what, how in beyond(found, TOLERANCE).items()]
    if wrong:
        numbers = f"perplexity {found['perplexity']:.6g} as read back, {found['perplexity_packed']:.6g} packed"
        raise ValueError(f"the export is not the model that was packed: {', '.join(wrong)}; {numbers}")


def _float32(model: nn.Module) -> nn.Module:
    """The model itself, or a copy in float32, which is what the folder holds."""
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return model
    return copy.deepcopy(model).to(torch.float32)


def _layer_inputs(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    widths = {name: layer.in_features for name, layer in packed_layers(model).items()}
    return {name: torch.randn(_LAYER_TOKENS, width, generator=generator) for name, width in widths.items()}


def _widths(folder: str | Path, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """in_features of each layer as written, which is larger where MLPs were padded."""
    tensors = load_file(Path(folder) / "model.safetensors")
    missing = [name for name in inputs if f"{name}.weight" not in tensors]
    if missing:
        raise ValueError(f"{folder} has no weight of {missing[0]}")
    return {name: tensors[f"{name}.weight"].shape[1] for name in inputs}


def _request(
    probe_ids: Tensor, windows: Sequence[Window], inputs: Mapping[str, Tensor], widths: Mapping[str, int]
) -> dict[str, Tensor]:
    request = {"probe_ids": probe_ids.cpu().clone().contiguous()}
    for name, x in inputs.items():
        request[f"layer.{name}"] = nn.functional.pad(x, (0, widths[name] - x.shape[1]))
    return request | window_request(windows)


def window_request(windows: Sequence[Window], text: str = "") -> dict[str, Tensor]:
    """Windows as a reader in another process takes them."""
    request = {}
    for i, (ids, start) in enumerate(windows):
        request[f"{text}window.{i:06d}"] = ids.cpu().clone().contiguous()  # windows are views of one text
        request[f"{text}start.{i:06d}"] = torch.tensor(start)
    return request


def _compare_perplexity(answer: Mapping[str, Tensor], model: nn.Module, windows: Sequence[Window]) -> dict[str, float]:
    packed = exp_mean(*log_likelihood(model, windows))
    read = _perplexity(answer["nll"])
    found = {"perplexity": read, "perplexity_packed": packed, "perplexity_difference": abs(read - packed) / packed}
    if "nll_bfloat16" in answer:
        found["perplexity_bfloat16"] = _perplexity(answer["nll_bfloat16"])
        found["bfloat16_cast"] = float(answer["bfloat16_cast"])
    return found


def _perplexity(nll: Tensor) -> float:
    return float(torch.exp(nll[0] / nll[1]))


@torch.no_grad()
def _compare_layers(answer: Mapping[str, Tensor], model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    device = _device(model)
    worst = 0.0
    for name, layer in packed_layers(model).items():
        y = layer(inputs[name].to(device)).cpu()
        read = answer[f"layer.{name}"]
        if bool(read[:, y.shape[1] :].any()):
            return float("inf")  # padded rows must give nothing
        worst = max(worst, relative_error(read[:, : y.shape[1]], y))
    return worst


def _device(model: nn.Module) -> torch.device:
    return next(iter((*model.parameters(), *model.buffers()))).device


def report(info: Mapping[str, Any]) -> list[str]:
    """Lines for people about what `qat.formats.bitnet.writing.save` returned for the verb."""
    found = info["verification"]
    padding = [info["padding"]] if "padding" in info else []
    return [
        f"wrote {info['folder']} (linear_class {info['linear_class']}, {info['bytes']:,} bytes of weights)",
        *padding,
        f"read back by stock transformers, on {info['text']}:"
        f" perplexity {found['perplexity']:.6g}, packed {found['perplexity_packed']:.6g}"
        f" (relative difference {found['perplexity_difference']:.1e}); logits differ by {found['logits_difference']:.1e},"
        f" single layers by {found['layers_difference']:.1e}",
        f"loaded as bfloat16 its perplexity is {found['perplexity_bfloat16']:.6g}",
    ]


def recorded(info: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What a run notes of it: facts for its result, and lines for people."""
    found = info["verification"]
    line = f"{info['folder']} = packed: stock transformers gives perplexity {found['perplexity']:.4f}"
    same = found["logits_difference"] == 0 and found["perplexity_difference"] == 0
    off = f"{found['perplexity_difference']:.1e} off, logits {found['logits_difference']:.1e} off"
    line += " and logits, equal to the bit" if same else f" ({off})"
    if "perplexity_bfloat16" in found:
        line += f"; loaded as bfloat16 {found['perplexity_bfloat16']:.4f}"
    return dict(found), [line]
