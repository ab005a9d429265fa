"""Which layers may be converted, and why not: the user's patterns, a layer's surroundings, and models that are refused.

A layer that silently stays in full precision is the trap of this field, so every rule here gives a reason in words.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

import torch
from torch import nn

from qat.conversion import roles
from qat.nn.bitlinear import BitLinear
from qat.nn.packed import PackedBitLinear

_OWN_MATRIX = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, BitLinear, PackedBitLinear)


def patterns(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


@dataclass(frozen=True)
class Selection:
    """The user's shell patterns."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def excludes(self, name: str) -> bool:
        return matches(name, self.exclude)

    def skip_reason(self, name: str) -> str | None:
        if self.excludes(name):
            return "matches exclude"
        if self.include and not matches(name, self.include):
            return "no match in include"
        return None

    def refuse_typos(self, model: nn.Module) -> None:
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        for key, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(f"{key}={pattern!r} matches no module of {type(model).__name__}")

    def names_exactly(self, name: str) -> bool:
        """Whether the user means this layer by its own name, without wildcards."""
        return name in self.include and not self.excludes(name)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern fits the name or a module that contains it."""
    parts = name.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(fnmatchcase(part, pattern) for part in above for pattern in patterns)


@dataclass(frozen=True)
class Context:
    """What a layer's surroundings say about it."""

    modules: dict[str, nn.Module]
    owners: dict[int, str]
    head: nn.Module | None
    counts: dict[int, str]
    widths: set[int]
    widest: int
    towers: dict[str, str]
    text: set[str]

    @classmethod
    def of(cls, model: nn.Module) -> Context:
        modules = dict(model.named_modules(remove_duplicate=False))
        tied = {
            id(weight): f"the embedding {name}" if isinstance(module, nn.Embedding) else f"{type(module).__name__} {name}"
            for name, module in modules.items()
            if not is_linear(module)
            for weight in module.parameters(recurse=False)
        }
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        widest = max((min(m.weight.shape) for m in modules.values() if is_linear(m)), default=0)  # type: ignore[arg-type]
        counts, widths = roles.counts_of(getattr(model, "config", None))
        return cls(modules, tied, head, counts, widths, widest, roles.towers(model), roles.outside_text(model))

    def firm_reason(self, name: str, module: nn.Module) -> str | None:
        """Why a layer cannot be converted, whatever the user says."""
        parent = self.modules.get(name.rpartition(".")[0])
        if id(module.weight) in self.owners:
            return f"tied to {self.owners[id(module.weight)]}"
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads this weight itself and never calls the layer"
        if "forward" in vars(module):
            return "its forward was replaced by another"
        if not is_conv1d(module) and type(module).forward is not nn.Linear.forward:
            return f"{type(module).__name__} has a forward of its own"
        if hasattr(module, "parametrizations"):
            return "its weight is parametrized"
        if not isinstance(module.weight, nn.Parameter):
            return "its weight is computed from other parameters (weight_norm, prune)"
        if not module.weight.numel():
            return f"it has no weights (shape {list(module.weight.shape)})"
        return roles.adapter_reason(name, self.modules)

    def soft_reason(self, name: str, module: nn.Module) -> str | None:
        """Why a layer should be left alone unless the user names it."""
        if module is self.head or any(part in roles.HEAD_NAMES for part in name.split(".")):
            return roles.HEAD_REASON
        return (
            roles.foreign_reason(module)
            or roles.low_rank_reason(name, self.modules)
            or roles.selector_reason(name, module, self.modules, self.counts, self.widths, self.widest)
        )

    def reader_reason(self, name: str) -> str | None:
        """By the source of the parent's forward: a branch for another device may read what the probe's did not."""
        parent_name, _, leaf = name.rpartition(".")
        parent = self.modules.get(parent_name)
        return f"{type(parent).__name__} reads this weight itself" if _reads_weight(parent, leaf) else None

    def tower_reason(self, name: str) -> str | None:
        """Without a probe, a text model's other towers stay: nobody knows whether the data will reach them."""
        for tower, reads in self.towers.items():
            if f"{name}.".startswith(f"{tower}."):
                return f"part of a tower of another modality ({tower}: {reads}); a probe with such data, or its name, converts it"
        if self.text and not any(f"{name}.".startswith(f"{one}.") for one in self.text):
            return "joins modalities, outside the text model; a probe with such data, or its name, converts it"
        return None


_READS_WEIGHT = r"(?<!isinstance\()\bself\.{}\.weight\b(?!\.(?:dtype|device|shape|requires_grad)\b)"


def _reads_weight(parent: nn.Module | None, leaf: str) -> bool:
    """Whether the parent's forward multiplies by the weight itself, so that BitLinear's forward would not be called."""
    if parent is None or isinstance(parent, nn.TransformerEncoderLayer):  # its fused path is disabled instead
        return False
    source = _forward_source(type(parent))  # type: ignore[arg-type]
    return re.search(_READS_WEIGHT.format(re.escape(leaf)), source) is not None


@cache
def _forward_source(kind: type[nn.Module]) -> str:
    """Source of a class's forward methods; Mamba's, for one, read `self.dt_proj.weight`."""
    methods = [method for name, method in inspect.getmembers(kind, inspect.isfunction) if "forward" in name]
    try:
        return "\n".join(map(inspect.getsource, methods))
    except (OSError, TypeError):
        return ""


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Conv1D, told by name and shape, so that transformers need not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def is_linear(module: nn.Module) -> bool:
    return (isinstance(module, nn.Linear) and not isinstance(module, BitLinear)) or is_conv1d(module)


def other_matrices(name: str, module: nn.Module) -> dict[str, str]:
    """Matrices that a module multiplies by itself: convolutions, recurrent layers, fused projections, routers."""
    if isinstance(module, _OWN_MATRIX):
        return {}
    why = f"{type(module).__name__} is neither nn.Linear nor Conv1D"
    return {
        f"{name}.{key}".lstrip("."): why
        for key, weight in module.named_parameters(recurse=False)
        if weight.ndim >= 2 and weight.shape[0] > 1 and weight.shape[1] > 1 and weight.is_floating_point()
    }


def refuse_quantized(model: nn.Module) -> None:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, BitLinear | PackedBitLinear):
            raise ValueError(f"already converted: {name or 'the model'} is a {type(module).__name__}")
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and (not weight.is_floating_point() or weight.itemsize < 2):
            raise ValueError(f"already quantized: {name or 'the model'} holds {weight.dtype} weights; load it in full precision")
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise ValueError("already quantized: the model's config has a quantization_config; load it in full precision")


def refuse_experts(model: nn.Module, selection: Selection) -> None:
    """Raise ValueError, once for all of them, for matrices that are stacked in 3-D parameters and not excluded."""
    found = list(_stacked(model, selection))
    if not found:
        return
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(weight.numel() for _, _, _, weight in found) / total
    shown = _listed([f"{name}.{key} {list(weight.shape)}".lstrip(".") for name, _, key, weight in found])
    first, _, key, weight = found[0]
    hint = _exclusion(model, sorted({name for name, *_ in found}))
    quoted = ", ".join(f'"{pattern}"' for pattern in hint)
    one = hint[0] if len(hint) == 1 else list(hint)
    raise ValueError(
        f"{first or 'the model'} ({type(found[0][1]).__name__}) stores {weight.shape[0]} expert matrices as the one"
        f" 3-D parameter {key!r} {list(weight.shape)}, which cannot become BitLinear layers; all of them: {shown};"
        f" {share:.0%} of the model's weights. To leave these in full precision knowingly, pass"
        f" 'model.exclude=[{quoted}]' on the command line, or in Python exclude={one!r}"
    )


def _listed(names: list[str]) -> str:
    """All of them; of many, those that differ in a layer's number as one: `layers.{0,1,2}.mlp.experts`."""
    if len(names) <= 16:
        return ", ".join(names)
    groups: dict[str, list[str]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        key = f"{name[: number.start()]}{{}}{name[number.end() :]}" if number else name
        groups.setdefault(key, []).append(number[0] if number else "")
    return ", ".join(key.replace("{}", f"{{{','.join(numbers)}}}") for key, numbers in groups.items())


def _stacked(model: nn.Module, selection: Selection) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    conv = nn.modules.conv._ConvNd
    for name, module in model.named_modules():
        if selection.skip_reason(name) or isinstance(module, (conv, nn.Bilinear)):
            continue
        for key, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3 and min(weight.shape) > 1:
                yield name, module, key, weight


def _exclusion(model: nn.Module, names: list[str]) -> list[str]:
    """Patterns that leave out these modules and no layer that could be converted; their names where no pattern does."""
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    found: list[str] = []
    for name in names:
        leaf = name.rpartition(".")[2]
        pattern = f"*.{leaf}" if "." in name else name
        spares = not any(matches(linear, (pattern,)) and not matches(linear, tuple(names)) for linear in linears)
        if (chosen := pattern if spares else name) not in found:
            found.append(chosen)
    return found
