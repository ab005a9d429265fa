"""A .gguf file as the runtime computes it: llama.cpp in place of transformers, which dequantizes the weights to float32.

llama.cpp quantizes activations too and keeps keys and values in float16, so its perplexity is another one, and it is the one
that a user of the file gets. It gives logits and nothing from inside: layers, samples and tasks need `--reader transformers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qat.config import ModelConfig
from qat.formats.gguf import container as gguf_file
from qat.formats.gguf import seal
from qat.formats.llamacpp import ggml
from qat.formats.llamacpp import questions as llamacpp
from qat.metrics.perplexity import Window
from qat.models.any import Loaded
from qat.models.hub import load_tokenizer, resolve
from qat.storage import local
from qat.terminal.stage import stage


def choose_reader(path: str, reader: str, needs_pytorch: Sequence[str]) -> str | None:
    """`llama.cpp` or `transformers` for a .gguf file; None for any other form, which has one reader.

    Args:
        reader: what was asked for. `auto` takes llama.cpp where it is installed and enough.
        needs_pytorch: the flags that llama.cpp cannot answer.

    Raises:
        ValueError: llama.cpp was asked for and cannot serve; the reason is named.
    """
    if not path.endswith(".gguf"):
        if reader != "auto":
            raise ValueError(f"--reader {reader} is for .gguf files; {path} has one reader, so leave it out")
        return None
    if reader != "llama.cpp":
        found = ggml.version() is not None and not needs_pytorch
        return "llama.cpp" if reader == "auto" and found else "transformers"
    if ggml.version() is None:
        raise ValueError(f"--reader llama.cpp: llama-cpp-python is not installed: {ggml.INSTALL}")
    if needs_pytorch:
        raise ValueError(
            "--reader llama.cpp gives perplexity, and KL and top-1 with --teacher;"
            f" {needs_pytorch[0]} needs --reader transformers"
        )
    return reader


class LlamaCppModel(nn.Module):
    """A file whose logits llama.cpp computes, in a process of its own for each call."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file
        whole = gguf_file.read(file)
        seal.seal(whole).refuse(file)
        whole.check_codes()  # llama.cpp would compute with whatever it finds
        metadata = whole.metadata
        positions = metadata.get(f"{metadata.get('general.architecture')}.context_length")
        self.config: Any = SimpleNamespace(max_position_embeddings=positions, get_text_config=lambda: self.config)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids int64 [B, L] -> logits float32 [B, L, V]. ValueError: llama.cpp refuses the file."""
        return torch.from_numpy(llamacpp.ask(self.file, {"probes": ids.cpu().numpy()}, exact=False)["logits"])

    def log_likelihood(self, batches: Iterable[Window]) -> tuple[float, int]:
        """`qat.metrics.perplexity.log_likelihood` of it, in one process, without the logits' way here."""
        request = llamacpp.window_request(batches)
        with stage("perplexity in llama.cpp"):
            answer: Any = llamacpp.ask(self.file, request, exact=False)
        total, count = answer["nll"]
        return float(total), int(count)


def load(path: str) -> Loaded:
    """A .gguf file in llama.cpp, with the tokenizer that transformers reads from it. Errors as `load_tokenizer`."""
    if not path.startswith("package://") and not local(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    return Loaded(
        LlamaCppModel(resolve(path)),
        load_tokenizer(ModelConfig(path=path)),
        f"GGUF, read by llama.cpp (llama-cpp-python {ggml.version()})",
    )
