"""Our quantizer for transformers: `from_pretrained` of a folder with `quant_method: "qat"` gives PackedBitLinear layers.

Importing this module registers it; `qat.registration` does so in time. In the file the codes of a layer are called `weight`,
uint8 [N, row bytes], where the architecture has a float [N, K]. That is on purpose: stock transformers without qat warns
about an unknown quant_method and goes on, and only a tensor of the wrong shape makes it stop; under a name of their own the
codes would be dropped, and the layers initialized at random.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qat.conversion.layers import packed_layers
from qat.conversion.overrides import gathered, layer_config
from qat.conversion.walker import listen, unpack
from qat.formats.packed.manifest import METHOD, describe, parse
from qat.formats.seal import refuse_altered
from qat.formats.stored import check_checksums, file_metadata, file_names, read_shapes


@register_quantization_config(METHOD)
class QatConfig(QuantizationConfigMixin):
    """The manifest (see `qat.formats.packed.manifest`) as transformers wants it: each entry an attribute."""

    def __init__(self, **manifest: Any) -> None:
        parse(manifest)
        self.__dict__.update(copy.deepcopy(manifest))


@register_quantizer(METHOD)
class QatQuantizer(HfQuantizer):
    """Loads and saves packed models. It quantizes nothing itself: that is `qat.convert`, training, `qat.pack`."""

    requires_calibration = True
    is_trainable = False
    is_compileable = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Put empty packed layers into the skeleton, after a look at whether the files have what these need."""
        record, widths = parse(self.quantization_config.to_dict())
        stored = {_local_name(model, name): name for name in record.converted}
        record.config = gathered({local: layer_config(record.config, name) for local, name in stored.items()})
        record.converted = list(stored)
        record.apply(model)
        layers = packed_layers(model)
        for name, layer in layers.items():
            if widths[stored[name]] != layer.in_features:
                found = f"{stored[name]} was packed with in_features={widths[stored[name]]}"
                raise ValueError(f"{found}, but {type(model).__name__} of this config has {layer.in_features}")
        if checkpoint_files is not None:
            _check_files([Path(file) for file in checkpoint_files], model, stored)
        self._renamings = _renaming(list(stored.values()))
        self.quantization_config = QatConfig(**describe(model, record))

    def get_weight_conversions(self) -> list[Any]:
        """`<layer>.weight` of the files is `<layer>.packed` of the module."""
        return self._renamings

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        """Refuse what would be garbage: weights that no file had, and codes or scales that no writer of ours produced."""
        missing = [name for name, tensor in model.state_dict(keep_vars=True).items() if not _was_loaded(tensor)]
        if missing:
            raise ValueError(f"the files have no weights for {len(missing)} tensors of the model, the first is {missing[0]}")
        for name, layer in packed_layers(model).items():
            layer.check(name)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: by the model's own names, as the manifest has them, not by those of older files."""
        said = self.quantization_config
        record = parse(said.to_dict())[0] if said is not None else None
        model.config.quantization_config = self.quantization_config = QatConfig(**describe(model, record))
        model._weight_conversions = []  # what transformers would revert when saving
        state = file_names(model, model.state_dict())
        return state, file_metadata(model, state)

    def is_serializable(self) -> bool:
        """Always."""
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        unpack(model)
        return model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)  # saving makes a string of config.dtype


@listen
def follow(model: Any, done: str) -> None:
    """Make transformers see a model that was packed in memory as one that it loaded, so that `save_pretrained` is right."""
    from transformers import modeling_utils  # it imports the quantizers, which import us

    of_transformers = isinstance(model, modeling_utils.PreTrainedModel)
    if not of_transformers:
        return
    if done == "packed":
        nothing: Any = None
        model.hf_quantizer = QatQuantizer(nothing)
        try:
            model.config.quantization_config = model.hf_quantizer.quantization_config = QatConfig(**describe(model))
        except ValueError:  # one folder cannot hold it: saving says why
            model.config.__dict__.pop("quantization_config", None)
    elif isinstance(getattr(model, "hf_quantizer", None), QatQuantizer):
        model.hf_quantizer.remove_quantization_config(model)


def _was_loaded(tensor: Tensor) -> bool:
    """transformers marks what it read or tied, and leaves on `meta` what stays on disk; the rest it only warns about."""
    return tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)


def _local_name(model: Any, name: str) -> str:
    """A layer's name in this model, which may be the base model of the one that was saved (AutoModel of a causal model)."""
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules(remove_duplicate=False))
    return name.removeprefix(prefix) if name not in modules and name.startswith(prefix) else name


def _renaming(names: Sequence[str]) -> list[Any]:
    from transformers.core_model_loading import WeightRenaming  # it imports the quantizers, which import us

    return [WeightRenaming(rf"^({'|'.join(map(re.escape, names))})\.weight$", r"\1.packed")]


def _check_files(files: Sequence[Path], model: nn.Module, stored: Mapping[str, str]) -> None:
    """Compare what the files say they hold with the skeleton, before anything of its size is allocated."""
    needed = {
        f"{stored[name]}.{key}": tensor
        for name, layer in packed_layers(model).items()
        for key, tensor in file_names(layer, layer.state_dict()).items()
    }
    found: dict[str, tuple[torch.dtype | str, list[int]]] = {}
    for file in files:
        if file.suffix != ".safetensors":
            raise ValueError(f"{file}: a packed model of qat is in safetensors files only; this may be a pickle")
        found |= read_shapes(file)
        check_checksums(file, needed)
    for name, tensor in needed.items():
        if name not in found:
            raise ValueError(f"{files[0].parent} has no tensor {name}")
        if found[name][0] != tensor.dtype and not name.endswith((".bias", ".rms_norm.weight")):
            raise ValueError(f"{name} is {found[name][0]}, but the format has {tensor.dtype}")
    for name, tensor in {**file_names(model, model.state_dict()), **needed}.items():
        if name in found and found[name][1] != list(tensor.shape):
            raise ValueError(f"{name} is {found[name][1]}, but {type(model).__name__} of this config has {list(tensor.shape)}")
    refuse_altered(files[0].parent)  # last: the others say more
