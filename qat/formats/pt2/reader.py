"""Run a .pt2 file as a program without transformers does: torch and qat.ops, in a process of its own.

    python -P reader.py FILE REQUEST RESULT

REQUEST and RESULT are safetensors files. REQUEST holds `probe_ids` int64 [B, T] and `window.I` int64 [B, L] with `start.I` (in
each row, tokens from there on are scored), the same for further texts as `text.J.window.I` and `text.J.start.I`; RESULT holds
`logits`, `nll` float64 [sum, count] and `text.J.nll`.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.formats.pt2 import program as aoti
from qat.metrics.perplexity import log_likelihood


class _Model(nn.Module):
    """The file's function as a module; not its child, since an exported graph refuses to be put into another mode."""

    def __init__(self, run: aoti.Runner) -> None:
        super().__init__()
        self.run = lambda ids: run(ids)

    def forward(self, ids: Tensor) -> Tensor:
        return self.run(ids)


@torch.no_grad()
def main(file: str, request_file: str, result_file: str) -> None:
    """Answer one request."""
    model, request = _Model(aoti.load(file)), load_file(request_file)
    result = {"logits": model(request["probe_ids"]).contiguous()}
    for text in {key.partition("window.")[0] for key in request if "window." in key}:
        keys = sorted(key for key in request if key.startswith(f"{text}window."))
        windows = [(request[key], int(request[key.replace("window.", "start.")])) for key in keys]
        result[f"{text}nll"] = torch.tensor(log_likelihood(model, windows), dtype=torch.float64)
    save_file(result, result_file)
    if heavy := {"transformers", "lightning"} & set(sys.modules):
        sys.exit(f"the reader imported {heavy.pop()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
