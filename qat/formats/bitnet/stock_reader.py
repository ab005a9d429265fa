"""Read a folder as a stranger would: stock transformers, in a process of its own, and never a line of qat.

    python -P stock_reader.py FOLDER REQUEST RESULT

REQUEST and RESULT are safetensors files. REQUEST holds `probe_ids` int64 [B, T], `layer.NAME` inputs float32 [T, in] of
quantized layers, `window.I` int64 [B, L] with `start.I` (in each row, tokens from there on are scored), the same for further
texts as `text.J.window.I` and `text.J.start.I`, and in its metadata `device`, `trust` ("1": the folder's own code may run) and
`bfloat16` ("1": perplexity once more, loaded in bfloat16). RESULT holds `logits`, `layer.NAME`, `nll` float64 [sum, count],
`text.J.nll`, `nll_bfloat16`, and `bfloat16_cast` (true: the model ran in bfloat16 only after a further `.to`).

Run by path and with -P: its folder must not be importable, since a file there may share a library's name.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def load(folder: str, device: str, trust: bool, **dtype: torch.dtype) -> Any:
    """The model, or SystemExit when a key is missing, unexpected or of another shape: stock loading only warns."""
    place = {} if device == "cpu" else {"device_map": device}
    reader: Any = AutoModelForCausalLM
    model, report = reader.from_pretrained(folder, output_loading_info=True, trust_remote_code=trust, **place, **dtype)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            names = sorted(map(str, report[what]))
            sys.exit(f"{len(names)} {what.replace('_', ' ')} in {folder}, the first is {names[0]}")
    return model.eval()


def negative_log_likelihood(model: Any, request: dict[str, Tensor], device: str, text: str = "") -> Tensor:
    """float64 [2]: the sum over all scored tokens of a text, and how many they are."""
    total, count = 0.0, 0
    for name in sorted(key for key in request if key.startswith(f"{text}window.")):
        ids, start = request[name].to(device), int(request[f"{text}start." + name.removeprefix(f"{text}window.")])
        logits = model(input_ids=ids, use_cache=False).logits
        for row, targets in zip(logits, ids, strict=True):
            total += F.cross_entropy(row[start - 1 : -1].float(), targets[start:], reduction="sum").double().item()
        count += ids[:, start:].numel()
    return torch.tensor([total, count], dtype=torch.float64)


def in_bfloat16(folder: str, request: dict[str, Tensor], device: str, trust: bool) -> dict[str, Tensor]:
    """As a user would load it. Weights that are not quantized keep their float32, at which autobitlinear's matmul stops."""
    model = load(folder, device, trust, dtype=torch.bfloat16)
    try:
        return {"nll_bfloat16": negative_log_likelihood(model, request, device), "bfloat16_cast": torch.tensor(False)}
    except RuntimeError:
        model.to(torch.bfloat16)
        return {"nll_bfloat16": negative_log_likelihood(model, request, device), "bfloat16_cast": torch.tensor(True)}


@torch.no_grad()
def main(folder: str, request_file: str, result_file: str) -> None:
    """Answer one request."""
    with safe_open(request_file, "pt") as file:
        asked = file.metadata()
    device, request = asked["device"], load_file(request_file)
    trust = asked["trust"] == "1"
    model = load(folder, device, trust)
    if model.dtype != torch.float32:
        sys.exit(f"{folder} loads as {model.dtype}, not as float32")
    result = {"logits": model(input_ids=request["probe_ids"].to(device), use_cache=False).logits.cpu().contiguous()}
    for key in (key for key in request if key.startswith("layer.")):
        result[key] = model.get_submodule(key.removeprefix("layer."))(request[key].to(device)).cpu().contiguous()
    result["nll"] = negative_log_likelihood(model, request, device)
    for text in {key.partition("window.")[0] for key in request if key.startswith("text.") and "window." in key}:
        result[f"{text}nll"] = negative_log_likelihood(model, request, device, text)
    if asked["bfloat16"] == "1":
        del model
        result.update(in_bfloat16(folder, request, device, trust))
    if "qat" in sys.modules:
        sys.exit("the stock reader imported qat")
    save_file(result, result_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
