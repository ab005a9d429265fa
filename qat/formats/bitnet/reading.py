"""Read checkpoints with `quant_method: "bitnet"`: microsoft/bitnet-b1.58-2B-4T, Falcon-E, onebitllms, and our own hf folders.

Decided by the config, never by the key's name, because one key means opposite things:

    linear_class bitlinear (the default)      weight_scale divides: 1 / mean|W|
    autobitlinear, quantization_mode offline  weight_scale multiplies, the bias too: (acc / s_x + bias) * weight_scale
    autobitlinear, quantization_mode online   float latent weights, no weight_scale: mean|W| is derived at every forward

`use_rms_norm` puts an RMSNorm in front of every layer's activation quantization: BitLinear's own, by `rms_norm_eps`.

For further training the codes t with scale s need a latent weight whose own mean is s again. t * s is not: its mean is s times
the fraction of non-zero codes (about 0.66), so every layer would shrink at once. `latent_weight` divides by that fraction.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.config import QuantConfig
from qat.conversion.walker import convert, pack
from qat.formats import upstream
from qat.formats.dtypes import remember
from qat.formats.folder import one_line, refuse_depth, refuse_report
from qat.formats.packed.folder import empty_model
from qat.formats.packed.manifest import METHOD, VERSION, quant_entry, sealed
from qat.formats.seal import refuse_altered
from qat.formats.stored import opened, weight_files
from qat.quantizers.packing import pack_ternary

_ROWS_A_BYTE = 4
_STOCK_NORM_EPS = 1e-6  # where the config has no rms_norm_eps


def load(folder: str | Path, *, latent: bool = False) -> nn.Module:
    """The model of a bitnet folder, float32, eval mode, on the CPU.

    Args:
        latent: False gives PackedBitLinear layers, for evaluation, inference and export. True gives BitLinear layers, for
            further training, which start from the same codes and scales.

    Raises:
        ValueError: no such folder, a missing or damaged tensor, or bytes that hold no codes.
    """
    folder = Path(folder)
    config, said = _config(folder)
    tensors = _read(folder)
    refuse_depth(config.to_dict(), len(tensors))
    skeleton = empty_model(config, "meta")
    layers = _layers(skeleton, said)
    _refuse_shapes(skeleton, tensors, layers)
    quant = QuantConfig(rms_norm_eps=_norm_eps(folder, said))
    norms = _norms(tensors, layers) if quant.rms_norm_eps is not None else {}
    online = _online(said)
    if not online:
        _decode(tensors, layers, multiplies=said.get("linear_class") == "autobitlinear", latent=latent)
    config.__dict__.pop("quantization_config", None)
    if not online and not latent:
        config.quantization_config = _manifest(layers, quant)
        tensors |= norms
    refuse_altered(folder)
    model = _build(type(skeleton), config, tensors, folder)
    if online or latent:
        convert(model, quant, include=list(layers))
        report = model.load_state_dict(norms, strict=False)
        assert not report.unexpected_keys, report
    if online and not latent:
        pack(model)
    return model.eval()


def load_master(folder: str | Path) -> nn.Module:
    """The model of a bitnet folder as if it had never been quantized: float32 linear layers with master weights, eval mode, CPU.

    They are the folder's own where it has them (`quantization_mode: online`), otherwise of `latent_weight`: converted, both are
    the checkpoint's model.

    Raises:
        ValueError: as `load`; or the layers have norms of their own, for which a linear layer has no place.
    """
    folder = Path(folder)
    config, said = _config(folder)
    if _norm_eps(folder, said) is not None:
        raise ValueError(f"{folder}: its layers have norms of their own (use_rms_norm), which full precision cannot have")
    tensors = _read(folder)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
    refuse_depth(config.to_dict(), len(tensors))
    skeleton = empty_model(config, "meta")
    layers = _layers(skeleton, said)
    _refuse_shapes(skeleton, tensors, layers)
    if not _online(said):
        _decode(tensors, layers, multiplies=said.get("linear_class") == "autobitlinear", latent=True)
    config.__dict__.pop("quantization_config", None)
    refuse_altered(folder)
    model = _build(type(skeleton), config, tensors, folder)
    remember(model, dtypes)
    return model.eval()


def _online(said: Mapping[str, Any]) -> bool:
    """Whether the folder holds float master weights, quantized at every forward."""
    return said.get("linear_class") == "autobitlinear" and said.get("quantization_mode") == "online"


def latent_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 [N, K] that `absmean` quantizes to these codes, int8 [N, K], and this scale, one element."""
    nonzero = codes.count_nonzero().clamp_min(1) / codes.numel()
    return codes.float() * (scale.float().reshape(()) / nonzero)


def _config(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly any class here
        raise ValueError(f"{folder / 'config.json'} is not a transformers config: {one_line(error)}") from error
    said = getattr(config, "quantization_config", None)
    if not isinstance(said, dict) or said.get("quant_method") != "bitnet":
        raise ValueError(f"{folder} is no bitnet checkpoint: its quantization_config is {said!r}"[:200])
    for key, allowed in (("linear_class", ("bitlinear", "autobitlinear")), ("quantization_mode", ("offline", "online"))):
        if said.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{folder}: {key}={said[key]!r} is not known; allowed are {', '.join(allowed)}")
    kept = said.get("modules_to_not_convert")
    if kept is not None and not (isinstance(kept, list) and all(isinstance(name, str) for name in kept)):
        raise ValueError(f"{folder}: modules_to_not_convert must be a list of names, not {kept!r}"[:300])
    return config, said


def _norm_eps(folder: Path, said: Mapping[str, Any]) -> float | None:
    """The epsilon of the norm in front of every layer; None where there is none."""
    if not said.get("use_rms_norm"):
        return None
    eps = said.get("rms_norm_eps", _STOCK_NORM_EPS)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        raise ValueError(f"{folder}: rms_norm_eps must be a number between 0 and 1, not {eps!r}"[:300])
    return float(eps)


def _norms(tensors: dict[str, Tensor], layers: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """Take each layer's norm out of the stored tensors, as float32. Stock readers make a missing one of ones."""
    norms = {}
    for name, linear in layers.items():
        key = f"{name}.rms_norm.weight"
        norms[key] = _take(tensors, key).float()
        if list(norms[key].shape) != [linear.in_features] or not bool(torch.isfinite(norms[key]).all()):
            raise ValueError(f"{key} is {list(norms[key].shape)}, not {linear.in_features} finite values")
    return norms


def _layers(skeleton: nn.Module, said: Mapping[str, Any]) -> dict[str, nn.Linear]:
    """The linear layers that the stock reader replaces."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    keep_fp32: Any = getattr(skeleton, "_keep_in_fp32_modules", None)
    kept = HfQuantizer.get_modules_to_not_convert(skeleton, said.get("modules_to_not_convert"), keep_fp32)  # type: ignore[arg-type]
    linears = {name: module for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    layers = {name: linear for name, linear in linears.items() if should_convert_module(name, kept)}
    if not layers:
        raise ValueError(f"the config's modules_to_not_convert leaves no linear layer of {type(skeleton).__name__}")
    return layers


def _read(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in weight_files(folder):
        with opened(file) as stored:
            tensors.update({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    return tensors


def _refuse_shapes(skeleton: nn.Module, tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Linear]) -> None:
    """Before anything of the config's size is allocated. The layers' own weights are checked where they are decoded."""
    for name, wanted in skeleton.state_dict().items():
        found = tensors.get(name)
        if found is not None and found.shape != wanted.shape and name.removesuffix(".weight") not in layers:
            raise ValueError(f"{name} is {list(found.shape)}, but the config asks for {list(wanted.shape)}")


def _decode(tensors: dict[str, Tensor], layers: Mapping[str, nn.Linear], multiplies: bool, latent: bool) -> None:
    """Replace each layer's stored tensors by ours, in place."""
    for name, linear in layers.items():
        stored = _take(tensors, f"{name}.weight"), _take(tensors, f"{name}.weight_scale")
        codes, scale = decode_layer(*stored, linear.out_features, linear.in_features, multiplies, name)
        if multiplies and linear.bias is not None:
            tensors[f"{name}.bias"] = _take(tensors, f"{name}.bias").float() * scale.reshape(())
        if latent:
            tensors[f"{name}.weight"] = latent_weight(codes, scale)
        else:
            tensors |= {f"{name}.weight": pack_ternary(codes, "2bit"), f"{name}.weight_scale": scale}


def _take(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the checkpoint has no tensor {name}")
    return tensors.pop(name)


def decode_layer(weight: Tensor, scale: Tensor, n: int, k: int, multiplies: bool, name: str) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and scale float32 [1, 1], which multiplies, of a layer's stored tensors.

    `weight` is four rows a byte, or the codes themselves as numbers, which the stock reader takes, too.
    """
    scale = scale.float()
    if scale.numel() != 1 or not bool(torch.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"{name}.weight_scale must be one finite value above 0, not {scale.flatten()[:4].tolist()}")
    if weight.dtype == torch.uint8 and n % _ROWS_A_BYTE == 0 and list(weight.shape) == [n // _ROWS_A_BYTE, k]:
        codes = torch.cat([weight >> 2 * i & 3 for i in range(_ROWS_A_BYTE)]).to(torch.int8) - 1
    elif weight.dtype != torch.uint8 and list(weight.shape) == [n, k]:
        ternary = (weight == -1) | (weight == 0) | (weight == 1)
        codes = torch.where(ternary, weight, 2).to(torch.int8)
    else:
        raise ValueError(f"{name}.weight is {weight.dtype} {list(weight.shape)}, not uint8 [{n // _ROWS_A_BYTE}, {k}]")
    bad = (codes > 1).nonzero()
    if len(bad):
        raise ValueError(f"{name}.weight holds no ternary code in row {bad[0, 0]}, column {bad[0, 1]}")
    return codes, scale.reshape(1, 1) if multiplies else 1 / scale.reshape(1, 1)


def _manifest(layers: Mapping[str, nn.Linear], config: QuantConfig) -> dict[str, Any]:
    widths = {name: linear.in_features for name, linear in layers.items()}
    kind = {"quant_method": METHOD, "version": VERSION, "layout": "2bit", "quant": quant_entry(config)}
    return sealed({**kind, "layers": widths, "skipped": {}})


def _build(kind: Any, config: Any, tensors: dict[str, Tensor], folder: Path) -> nn.Module:
    config = copy.deepcopy(config)
    config.dtype = torch.float32
    try:
        upstream.listen()
        model, report = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        raise ValueError(f"cannot load {folder}: {one_line(error)}") from error
    refuse_report(report, folder)
    return model
