"""Models small enough to read, for tests of several modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import qat
from qat import BitLinear, PackedBitLinear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    """A language model small enough to read: embedding, two blocks, an output head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(8, 16, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def compiled_and_counted(layer: nn.Module) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    """A layer compiled anew without a graph break, and a list that grows by each graph that is made."""
    torch._dynamo.reset()
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(1)
        return graph.forward

    return torch.compile(layer, fullgraph=True, backend=count), graphs  # type: ignore[arg-type,return-value]


def assert_untouched(model: nn.Module) -> None:
    """No layer was converted."""
    assert not any(isinstance(module, BitLinear | PackedBitLinear) for module in model.modules())


SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
"""Of a transformers model: Llama, Qwen2, BitNet, ..."""


def packed_model(
    config: object = None, layout: str = "2bit", auto: type = AutoModelForCausalLM, **quant: object
) -> PreTrainedModel:
    """A random transformers model, Llama by default, with biases that are not zero."""
    torch.manual_seed(0)
    model = auto.from_config(config or LlamaConfig(**SIZES)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    qat.convert(model, qat.QuantConfig(**quant))
    qat.pack(model, layout=layout)
    return model


def write_model(folder: Path, hidden_size: int, intermediate_size: int, num_hidden_layers: int, dropout: float = 0.1) -> Path:
    """A random Llama with a character tokenizer, as a transformers folder."""
    vocabulary = {character: i for i, character in enumerate("?$\n abcdefghijklmnopqrstuvwxyz.,")}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="$")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=dropout,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


X = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    """Two layers, of which `rule` says what becomes of the second."""

    def __init__(self, rule: Callable[[Pair, Tensor], Tensor], outputs: int = 32) -> None:
        super().__init__()
        self.first, self.second, self.rule = nn.Linear(32, 32), nn.Linear(32, outputs), rule

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(self.first(x).relu())

    def helper(self, h: Tensor) -> Tensor:
        return self.rule(self, h)


def outcome(rule: Callable[[Pair, Tensor], Tensor], outputs: int = 32, **more: object) -> str | None:
    """Why `second` stays; None where it is converted. `first` always is."""
    record = qat.convert(Pair(rule, outputs), probe=X, **more)  # type: ignore[arg-type]
    assert "first" in record.converted
    return record.skipped.get("second")
