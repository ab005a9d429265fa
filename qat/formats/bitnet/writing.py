"""The stock transformers folder, `quant_method: bitnet`: runs wherever transformers runs, without qat.

`weight` is uint8 [out / 4, in]; byte [r, c], bits (2i, 2i + 1), holds t[i * out / 4 + r, c] + 1. The one key `weight_scale` means
opposite things by `linear_class`, and reading it wrongly is off by the scale's square:

    bitlinear       stores 1 / scale      y = acc / (s_x * weight_scale) + bias
    autobitlinear   stores scale          y = (acc / s_x + bias) * weight_scale, so bias / scale is stored as the bias

Layers that norm their input (`rms_norm_eps`) keep the norm's weight as `<layer>.rms_norm.weight`, `use_rms_norm` in the config.
Everything else keeps the dtype of its source; the config says float32, in which all of it is loaded. What the format cannot hold
is told by `unsupported`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.conversion.layers import packed_layers, quantized_layers
from qat.formats.bitnet import limits
from qat.formats.bitnet.limits import mlp_padding, not_converted, stock_skeleton
from qat.formats.bitnet.read_back import read_back as read_back
from qat.formats.bitnet.read_back import recorded as recorded
from qat.formats.bitnet.read_back import report as report
from qat.formats.bitnet.tensors import stock_tensors
from qat.formats.card import model_card
from qat.formats.folder import WEIGHTS, WRITER, new_folder
from qat.formats.packed.folder import save_config, transformers_config
from qat.formats.padding import Padding
from qat.formats.stored import save_file
from qat.nn.bitlinear import BitLinear

LINEAR_CLASSES = ("bitlinear", "autobitlinear")
Card = Mapping[str, Any] | Callable[[dict[str, Any]], Mapping[str, Any]]


def unsupported(
    model: nn.Module, tokenizer: Any = None, *, linear_class: str = "bitlinear", floats: str = "source"
) -> str | None:
    """Why the format cannot hold this model (packed, or with BitLinear layers), or None where it can."""
    return limits.unsupported(model)


def save(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    linear_class: str = "bitlinear",
    floats: str = "source",
    card: Card | None = None,
    check: Callable[[Path], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write a packed model as a stock transformers folder, with its model card.

    Args:
        model: a transformers model with PackedBitLinear layers.
        folder: replaced if an earlier export wrote it.
        linear_class: `bitlinear` (the default of readers) or `autobitlinear`.
        floats: in which dtype what is not quantized is stored, of `qat.targets.FLOATS`; the config says float32, as it is loaded.
        card: facts of the model card, see `qat.formats.card.model_card`, or a function that gives them for what `check` returned.
        check: called with the finished folder before it gets its name, such as `read_back`; if it raises, nothing is left.

    Returns:
        {"folder", "linear_class", "bytes": of the weights file, "padding": one sentence, if MLPs were padded,
        "verification": what `check` returned}.

    Raises:
        ValueError: the format cannot hold the model (the reason is named), a foreign target, or the disk refuses.
    """
    if linear_class not in LINEAR_CLASSES:
        raise ValueError(f"linear_class={linear_class!r} is not allowed; choose one of {', '.join(LINEAR_CLASSES)}")
    _refuse(model)
    padding = mlp_padding(model)
    config = _config(model, padding, linear_class)
    with new_folder(folder) as partial:
        save_file(stock_tensors(model, padding, linear_class, floats), partial / WEIGHTS, {"format": "pt", **WRITER})
        save_config(model, config, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        info: dict[str, Any] = {"folder": str(folder), "linear_class": linear_class, "bytes": (partial / WEIGHTS).stat().st_size}
        info |= {"padding": padding.note()} if padding.added else {}
        info |= {"verification": check(partial)} if check else {}
        quant = next(iter(packed_layers(model).values())).config
        given = card(info.get("verification", {})) if callable(card) else card
        facts = {"name": Path(folder).name, **(given or {})}
        text = model_card(facts, quant, linear_class, padding.note() if padding.added else None)
        (partial / "README.md").write_text(text, encoding="utf-8")
    return info


def _refuse(model: nn.Module) -> None:
    reason = unsupported(model)
    unpacked = [name for name, layer in quantized_layers(model).items() if isinstance(layer, BitLinear)]
    if reason is None and unpacked:
        reason = f"{unpacked[0]} is not packed yet; call qat.pack first"
    if reason:
        raise ValueError(f"the hf format cannot hold this model: {reason}")


def _config(model: nn.Module, padding: Padding, linear_class: str) -> Any:
    config = padding.raise_config(transformers_config(model))
    config.dtype = torch.float32
    eps = next(iter(packed_layers(model).values())).config.rms_norm_eps
    config.quantization_config = {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": not_converted(quantized_layers(model), stock_skeleton(model, padding)),
        "use_rms_norm": eps is not None,
    } | ({} if eps is None else {"rms_norm_eps": eps})
    return config
