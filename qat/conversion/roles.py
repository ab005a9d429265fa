"""What a layer is by its place and shape, where nothing has run: heads, selectors, adapters, towers of another modality.

Names only choose defaults here; a probe (`qat.conversion.probe`) knows more. Ternary weights cost a selector its meaning and save
nothing: a router of 64 experts is a ten-thousandth of its model, and which expert it picks is decided by the last bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import permutations
from typing import Any

from torch import nn

HEAD_NAMES = ("lm_head", "embed_out", "classifier", "score", "qa_outputs")
ROUTERS = ("gate", "router", "shared_expert_gate")
HEAD_REASON = "output head, kept in full precision"
ROUTER_REASON = "MoE router, kept in full precision"
ADAPTER_REASON = "part of an adapter, or under one; merge adapters into the model before it is converted"
TINY, WIDE = 8, 32
"""A side of at most TINY, in a model with layers of at least WIDE, is a gate's or a mixing matrix's."""
NARROW = 4
_COUNT = re.compile(r"(experts|heads?)$")
_NO_COUNT = re.compile(r"per_tok|top_?k|select|shared|size|dim")
_ADAPTER = re.compile(r"(?i)lora_?[a-z]?$|(?<![a-z])lora_|adapter")


def selector_reason(
    name: str, module: nn.Module, modules: dict[str, nn.Module], counts: dict[int, str], widths: set[int], widest: int
) -> str | None:
    """Why a layer [N, K] looks like one that selects, gates or mixes rather than projects; None for a projection."""
    n, k = module.weight.shape  # type: ignore[misc]
    if type(module).__name__ == "Conv1D":
        n, k = k, n
    parent_name, _, leaf = name.rpartition(".")
    parent = modules.get(parent_name)
    if leaf in ROUTERS and hasattr(parent, "experts"):
        return ROUTER_REASON
    above = [modules[one] for one in _ancestors(name)][:2]
    experts = {len(child) for one in above for child in one.children() if _are_experts(one, child)}  # type: ignore[arg-type]
    experts |= {len(child) for child in above[0].children() if _are_alike(child)} if above else set()  # type: ignore[arg-type]
    if n in experts and n < k:
        return f"{ROUTER_REASON} ({n} outputs for {n} experts)"
    if any("indexer" in type(one).__name__.lower() for one in map(modules.__getitem__, _ancestors(name))):
        return "part of a sparse-attention indexer, kept in full precision"
    own = {value: key for one in above for key, value in vars(one).items() if _is_count(key, value)}
    for times in (1, 2):
        what = own.get(n // times) or counts.get(n // times)
        if what and n % times == 0 and n * NARROW <= k and n not in widths:
            return f"a selector or gate, kept in full precision ({n} outputs, {f'{times} x ' if times > 1 else ''}{what})"
    in_line = "." not in name and isinstance(modules.get(""), nn.Sequential)  # all that the model computes passes through it
    if min(n, k) <= TINY and widest >= WIDE and not in_line:
        return f"a gate or mixing matrix, kept in full precision ([{n}, {k}])"
    return None


def _ancestors(name: str) -> list[str]:
    """The names of the modules around one, the nearest first; the root, "", is the last."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)] if name else []


def _are_experts(parent: nn.Module, child: nn.Module) -> bool:
    names = [name for name, module in parent.named_children() if module is child]
    return isinstance(child, nn.ModuleList) and any("expert" in name for name in names)


def _are_alike(child: nn.Module) -> bool:
    """Several branches of one kind, beside a layer with an output for each."""
    return isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(one) for one in child}) == 1


def _is_count(key: str, value: object) -> bool:
    plain = isinstance(value, int) and not isinstance(value, bool) and value > 1
    return plain and bool(_COUNT.search(key)) and not _NO_COUNT.search(key)


def counts_of(config: Any) -> tuple[dict[int, str], set[int]]:
    """Numbers of experts and heads that a configuration and those inside it name (number -> key); outputs of its projections."""
    found: dict[int, str] = {}
    widths: set[int] = set()
    for one in _configs(config):
        found.update({value: key for key, value in vars(one).items() if _is_count(key, value)})
        widths |= _projection_widths(one)
    return found, widths


def _projection_widths(config: Any) -> set[int]:
    """The outputs of keys and values, which may be as few as there are heads, and the hidden size."""
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    dim = getattr(config, "head_dim", None) or (hidden // heads if isinstance(heads, int) and isinstance(hidden, int) else None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    keys = {dim * groups} if isinstance(dim, int) and isinstance(groups, int) else set()
    return keys | ({hidden} if isinstance(hidden, int) else set())


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    if config is None or not hasattr(config, "__dict__"):
        return
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _configs(value)


def foreign_reason(module: nn.Module) -> str | None:
    """A subclass of nn.Linear from elsewhere does, or stands for, more than multiplying."""
    kind = type(module)
    home = kind.__module__.partition(".")[0]
    if kind is nn.Linear or home in ("torch", "transformers") or not isinstance(module, nn.Linear):
        return None
    return f"{kind.__name__} is a kind of nn.Linear of {kind.__module__}, which BitLinear would replace"


def adapter_reason(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Layers of an adapter, and the layer under it: merging it later would shift codes that were trained without it."""
    if _ADAPTER.search(name.rpartition(".")[2]):
        return ADAPTER_REASON
    for above in _ancestors(name):
        own = {*modules[above]._modules, *modules[above]._parameters}
        leaf = above.rpartition(".")[2]
        if "base_layer" in own or any(_ADAPTER.search(key) for key in own if key.startswith("lora")) or re.match(r"lora_", leaf):
            return ADAPTER_REASON
    return None


def low_rank_reason(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Three linear layers that are all of a module's, [N, K], [r, K] and [N, r] of a small r: the adapter goes by any name."""
    parent = modules.get(name.rpartition(".")[0])
    if parent is None or isinstance(parent, nn.Sequential | nn.ModuleList):  # a chain of layers, in which none lies over another
        return None
    shapes = [child.weight.shape for child in parent.children() if isinstance(child, nn.Linear)]
    if len(shapes) != 3:
        return None
    for (n, k), (r, inputs), (outputs, rank) in permutations(shapes):
        if (n, k, r) == (outputs, inputs, rank) and r * NARROW <= min(n, k):
            return ADAPTER_REASON
    return None


def towers(model: nn.Module) -> dict[str, str]:
    """Modules (name -> what they read) of another modality than the text that the model is for; {} for a model of one."""
    config = getattr(model, "config", None)
    text = _text_config(config)
    mixed = text is not config and type(text) is not type(config)
    if getattr(model, "main_input_name", "input_ids") != "input_ids" and not mixed:
        return {}
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict")] if config is not None else []
    others = tuple({type(one) for one in inner if type(one) not in (type(text), type(config))})
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        reads = getattr(module, "main_input_name", "input_ids")
        if name and reads != "input_ids":
            found[name] = reads
        elif name and others and isinstance(getattr(module, "config", None), others):
            found[name] = type(module.config).__name__.removesuffix("Config")
    return found


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):  # none, or several
        return config


def outside_text(model: nn.Module) -> set[str]:
    """The text backbones of a model that is made of several, or nothing: what lies beside them joins modalities."""
    config = getattr(model, "config", None)
    text = _text_config(config)
    if text is config or type(text) is type(config) or not towers(model):
        return set()
    return {name for name, module in model.named_modules() if name and type(getattr(module, "config", None)) is type(text)}
