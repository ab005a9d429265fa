"""One sequence, token by token: prefill, then steps of one token over a cache that is allocated once (`qat.inference.kvcache`).

A small model's token takes a few milliseconds, of which Python and torch's dispatcher are most: some 40 calls a layer. So the
layers of the common shape (RMS norms, rotary halves, grouped queries, a SiLU gate: Llama, Mistral, Qwen 2 and 3) run in one call
of the compiled kernels, `qat::cpu_decode`. Any other model runs as transformers runs it. Rejected: torch.compile of the step,
which takes minutes before a user's first token where a model has 30 layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.conversion.probe import same_step
from qat.inference.kvcache import BufferedLayer, buffered_cache
from qat.inference.tiles import Leader, TiledLinear

SHAPES = ("llama", "mistral", "qwen2", "qwen3")
"""The `model_type`s that `qat::cpu_decode` knows."""
_GROWING_ROPE = ("dynamic", "longrope")  # their angles depend on the length


class Decoder:
    """A causal language model of transformers, and what it has read so far; at most `room` tokens.

    A model whose step over a cache is not its full forward (`why` says so) reads the whole text for each token: slow, but right.
    """

    def __init__(self, model: Any, room: int) -> None:
        self.model, self.why = model, why_uncached(model)
        self.ids: list[Tensor] = []
        self.native: Native | None = None
        if not self.why:
            self.cache = buffered_cache(model, room)
            self.native = native(model, self.cache.layers, room)

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:
        """Logits [V] after the further tokens int64 [T]."""
        if self.why:
            self.ids.append(ids)
            return self.model(input_ids=torch.cat(self.ids)[None], use_cache=False).logits[0, -1]
        if self.native is not None and len(ids) == 1:
            return self._step(self.native, ids)
        output: Any = self.model(input_ids=ids[None], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1]

    def _step(self, native: Native, ids: Tensor) -> Tensor:
        core = self.model.model
        hidden = native(core.embed_tokens(ids), self.cache.get_seq_length())
        native.advance(self.cache.layers)
        return self.model.lm_head(core.norm(hidden))[0]


_TRIED = 8  # tokens, of which the last two are read one by one


@torch.inference_mode()
def why_uncached(model: Any) -> str:
    """Why tokens cannot be read one by one over `buffered_cache`, in words; "" where that gives the logits of one pass.

    Tried, not looked up: state-space and recurrent models take the cache of attention among keywords that they ignore, and
    continue from one token. `model` is in eval mode.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (1, _TRIED), generator=generator).to(model.device)
    try:
        cache = buffered_cache(model, _TRIED)
        for piece in (ids[:, :-2], ids[:, -2:-1], ids[:, -1:]):
            step = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
    except Exception as error:  # whatever the model raises
        return f"{type(model).__name__} does not run over a cache: {str(error).partition(chr(10))[0]}"
    whole, forgot = (model(input_ids=part, use_cache=False).logits[0, -1] for part in (ids, ids[:, -1:]))
    return "" if same_step(step, whole, forgot) else f"{type(model).__name__} gives other logits over a cache than in one pass"


class Native(NamedTuple):
    """The arguments of `qat::cpu_decode` for one model and one cache."""

    weights: list[Tensor]
    sizes: list[int]
    keys: Tensor
    values: Tensor
    cos: Tensor
    sin: Tensor
    constants: tuple[int, float, float, float]

    def __call__(self, hidden: Tensor, position: int) -> Tensor:
        """One embedded token [1, H] at `position` through all layers."""
        cos, sin = self.cos[position], self.sin[position]
        return torch.ops.qat.cpu_decode(
            hidden, self.weights, self.sizes, self.keys, self.values, cos, sin, position, *self.constants
        )

    @staticmethod
    def advance(layers: list[Any]) -> None:
        """The cache holds one token more."""
        for layer in layers:
            layer.length += 1


def native(model: Any, cache: list[Any], room: int) -> Native | None:
    """The native step of a model, its cache's buffers in one piece; None where model or cache are of another shape."""
    config = model.config
    if config.model_type not in SHAPES or config.hidden_act != "silu" or model.dtype != torch.float32:
        return None
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _GROWING_ROPE or not all(type(layer) is BufferedLayer for layer in cache):
        return None
    layers = [_layer(layer) for layer in model.model.layers]
    if not layers or any(layer is None for layer in layers):
        return None
    weights = [tensor for layer in layers if layer for tensor in layer[0]]
    sizes = [size for layer in layers if layer for size in layer[1]]
    attention, leader = model.model.layers[0].self_attn, model.model.layers[0].self_attn.q_proj
    shape = len(layers), config.num_key_value_heads, room, attention.head_dim
    keys, values = torch.zeros(shape), torch.zeros(shape)
    for i, layer in enumerate(cache):
        layer.take(keys[i][None], values[i][None])
    with torch.no_grad():
        cos, sin = (part[0].contiguous() for part in model.model.rotary_emb(keys, torch.arange(room)[None]))
    constants = config.num_attention_heads, float(config.rms_norm_eps), leader.linear.eps, float(attention.scaling)
    return Native(weights, sizes, keys, values, cos, sin, constants)


def _layer(layer: Any) -> tuple[list[Tensor], list[int]] | None:
    """Tensors and sizes of one layer, as `cpu_decode` wants them; None where a projection is not tiled and fused."""
    attention, mlp = layer.self_attn, layer.mlp
    fused = attention.q_proj, mlp.gate_proj
    if not all(isinstance(leader, Leader) for leader in fused):
        return None
    linears = [fused[0].linear, attention.o_proj, fused[1].linear, mlp.down_proj]
    if not all(isinstance(linear, TiledLinear) and linear.eps == linears[0].eps for linear in linears):
        return None
    if any(linear.rms_norm is not None or linear.components > 1 for linear in linears):
        return None
    parts = [_tensors(linear) for linear in linears]
    norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    heads = [_norm(attention, "q_norm"), _norm(attention, "k_norm")]
    weights = [norms[0], *parts[0], *parts[1], norms[1], *parts[2], *parts[3], *heads]
    return [weight.detach() for weight in weights], [size for linear in linears for size in linear.sizes]


def _tensors(linear: TiledLinear) -> list[Tensor]:
    return [linear.tiles, linear.scale, torch.empty(0) if linear.bias is None else linear.bias]


def _norm(attention: nn.Module, name: str) -> Tensor:
    return getattr(attention, name).weight if hasattr(attention, name) else torch.empty(0)


def greedy(decoder: Decoder, prompt: Tensor, count: int) -> Tensor:
    """The `count` likeliest tokens int64 after the prompt int64 [T], one by one."""
    logits, tokens = decoder.read(prompt), []
    for _ in range(count):
        tokens.append(logits.argmax()[None])
        if len(tokens) < count:
            logits = decoder.read(tokens[-1])
    return torch.cat(tokens)
