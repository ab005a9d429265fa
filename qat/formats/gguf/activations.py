"""A packed model that computes in PyTorch as llama.cpp does from a GGUF file: the reference that llama.cpp is compared with.

llama.cpp quantizes the input of each matrix to int8 in blocks along K, not per token: to ggml's Q8_0 for Q1_0 and Q2_0, to its
Q8_K for TQ1_0 and TQ2_0 (ggml-quants.c, quantize_row_q8_0 and quantize_row_q8_K). Embeddings and head have the file's values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.conversion.layers import packed_layers
from qat.formats.gguf.architectures import Names, architecture
from qat.formats.gguf.blocks import BLOCKS
from qat.formats.gguf.container import GGUFFile
from qat.formats.packed.folder import transformers_config

_SEED = 0


def q8_0(x: Tensor) -> Tensor:
    """x float32 [..., K], K a multiple of 32, quantized and back: int8 times a float16 scale, max|x| / 127, for each 32."""
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = torch.round(blocks * torch.where(largest > 0, 127 / largest, 0))
    return (codes * (largest / 127).half().float()).flatten(-2)


def q8_k(x: Tensor) -> Tensor:
    """x float32 [..., K], K a multiple of 256, likewise: the entry of largest magnitude in each 256 becomes -127."""
    blocks = x.unflatten(-1, (-1, 256))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(largest != 0, -127 / largest, 0)
    codes = torch.round(blocks * inverse).clamp(max=127)
    return (codes * torch.where(largest != 0, 1 / inverse, 0)).flatten(-2)


_Q8 = {"q1_0": (q8_0, 32), "q2_0": (q8_0, 32), "tq1_0": (q8_k, 256), "tq2_0": (q8_k, 256)}
_KIND = {block.number: name for name, block in BLOCKS.items()}


def as_llama_cpp(model: nn.Module, file: GGUFFile, noise: float = 0.0) -> nn.Module:
    """A float32 copy of a packed model that computes as llama.cpp does from the `file` that it was written to: scales in float16,
    and all float weights of embeddings and head, are the file's.

    Args:
        noise: every quantized layer's input is multiplied by 1 + noise * N(0, 1), with a fixed seed: how far that moves the
            logits is how exactly anybody can reproduce them.
    """
    config: Any = transformers_config(model)
    names = Names(architecture(config), config.num_hidden_layers)
    model = nn.Module.float(copy.deepcopy(model))  # transformers refuses its own `float` for a folder of ours
    _set_floats(model, file)
    generator = torch.Generator().manual_seed(_SEED)
    for name, layer in packed_layers(model).items():
        quantize, block = _Q8[_KIND[file.tensors[names[f"{name}.weight"]].kind]]
        layer.weight_scale = layer.weight_scale.half().float()
        layer.config = replace(layer.config, act_bits=None, backward="input", kernels="auto")
        layer.register_forward_pre_hook(_activations(quantize, block, noise, generator))
    return model


def _set_floats(model: Any, file: GGUFFile) -> None:
    """Embeddings and head as they are in the file, which may round them or quantize them."""
    head = model.get_output_embeddings()
    for module, name in ((model.get_input_embeddings(), "token_embd.weight"), (head, "output.weight")):
        if name in file.tensors and isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight = nn.Parameter(torch.from_numpy(file.float32(name).copy()), requires_grad=False)
    if "output.weight" not in file.tensors:
        head.weight = model.get_input_embeddings().weight


def _activations(
    quantize: Callable[[Tensor], Tensor], block: int, noise: float, generator: torch.Generator
) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    def quantized(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        x = inputs[0].float()
        if noise:
            x = x * (1 + noise * torch.randn(x.shape, generator=generator))
        width = x.shape[-1]
        return quantize(F.pad(x, (0, -width % block)))[..., :width]  # an MLP may have been widened with zeros

    return quantized
