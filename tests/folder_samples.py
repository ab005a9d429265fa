"""Small random models, packed, and a way to damage what was written, for the tests of the packed and the stock folder."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import qat
from qat.conversion.layers import packed_layers
from qat.formats.folder import read_metadata
from qat.metrics.perplexity import windows

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 43,  # odd: padded to 44
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.randint(64, (512,), generator=torch.Generator().manual_seed(0))
WINDOWS = list(windows(IDS, 64))
Q = "model.layers.0.self_attn.q_proj"


def packed_model(config=None, layout="2bit", exclude=None, **quant):
    torch.manual_seed(0)
    config = config or LlamaConfig(**SMALL, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    record = qat.convert(model, qat.QuantConfig(**quant), exclude=exclude)
    qat.pack(model, layout=layout)
    return model, record


def qwen2(**changes):
    return Qwen2Config(**{**SMALL, "tie_word_embeddings": False, **changes})


def normed_model(width=44):
    """Every layer norms its own input, by weights of its own."""
    model, record = packed_model(qwen2(intermediate_size=width), rms_norm_eps=0.01)
    for layer in packed_layers(model).values():
        nn.init.normal_(layer.rms_norm.weight, 1, 0.25)
    return model, record


def rewrite(file, change, **metadata):
    """Write `file` again after `change(tensors)`."""
    tensors, old = load_file(file), read_metadata(file)
    change(tensors)
    save_file(tensors, file, {key: value for key, value in {**old, **metadata}.items() if value is not None})
