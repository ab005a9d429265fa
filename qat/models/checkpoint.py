"""What a checkpoint's files hold against what the model took of them: transformers only warns where the two differ.

A bias that is dropped, a layer too many, a weight that starts at random: each gives another model, which would be trained and
called full precision. So whatever no parameter takes is refused, and so is whatever the files lack, unless the architecture
itself says that it can do without: old buffers, layers for multi-token prediction, another modality's tower. Those are named.

Names differ between files and models; transformers' own renaming is applied to the files' names, so that this holds for every
architecture that it can load, and says for each parameter in which dtype it was stored.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from qat.formats.stored import read_shapes
from qat.models.heads import LANGUAGE, Head

_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them."""
_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.|rotary_pos_emb\.|rope\.|rotary\.)?(inv_freq|position_ids|masked_bias|causal_mask|_extra_state)$"
)
"""Computed from the config, so that a file's copy is not needed; older models had them."""
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|self_attention)\.bias$")
_NAMED = 3


class Stored(NamedTuple):
    """A tensor as its file announces it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def stored(source: str, explicit: str | None = None, **where: Any) -> dict[str, Stored]:
    """name -> dtype and shape of every tensor in the weight files of a folder or hub id, as transformers chooses the files.

    Args:
        explicit: the file that the config names (`transformers_weights`).
        where: `revision` and `local_files_only`, as for from_pretrained.

    Raises:
        ValueError: a shard that lies in the folder is in no index.
    """
    found: dict[str, Stored] = {}
    for file in _weight_files(source, explicit, where):
        found.update(_announced(file))
    return found


def _weight_files(source: str, explicit: str | None, where: Mapping[str, Any]) -> list[str]:
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    for name in (explicit, *_FILES) if explicit else _FILES:
        try:
            file = cached_file(source, name, **where)
        except OSError:
            continue
        if not name.endswith(".json"):
            return [str(file)]
        shards, _ = get_checkpoint_shard_files(source, file, **where)
        _refuse_strays(Path(source), {Path(shard).name for shard in shards})
        return [str(shard) for shard in shards]
    return []


def _refuse_strays(folder: Path, shards: set[str]) -> None:
    """A shard without an entry in the index is not read."""
    kinds = {re.sub(r"\d+-of-\d+", "*-of-*", name) for name in shards}
    beside = {file.name for kind in kinds if "*" in kind for file in folder.glob(kind)} if folder.is_dir() else set()
    if stray := sorted(beside - shards):
        raise ValueError(f"{folder}: {stray[0]} is a part of the weights that the index does not name; the index is damaged")


def _announced(file: str) -> dict[str, Stored]:
    if file.endswith(".safetensors"):
        return {name: _of(name, file, *about) for name, about in read_shapes(Path(file)).items()}
    content = torch.load(file, map_location="meta", weights_only=True)
    return {name: Stored(tensor.dtype, tuple(tensor.shape)) for name, tensor in content.items() if torch.is_tensor(tensor)}


def _of(name: str, file: str, dtype: torch.dtype | str, shape: list[int]) -> Stored:
    if isinstance(dtype, str):
        raise ValueError(f"{file}: {name} is stored as {dtype}, which torch does not have; give the full-precision checkpoint")
    return Stored(dtype, tuple(shape))


def targets(model: Any, names: Iterable[str]) -> dict[str, list[str]]:
    """The parameters and buffers for which each name of the files stands, by the renaming that transformers has just applied."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    applied = getattr(model, "_weight_conversions", None) or []
    renamings = [one for one in applied if isinstance(one, WeightRenaming)]
    converters = [one for one in applied if isinstance(one, WeightConverter)]
    several = {pattern: one.target_patterns for one in converters for pattern in one.source_patterns}
    state = model.state_dict()
    found = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = name, None
        kinds = several.get(pattern or "", [])
        found[name] = [renamed.replace(kinds[0], kind) for kind in kinds] if kinds else [renamed]
    return found


def check(
    model: Any, report: Mapping[str, Any], files: Mapping[str, Stored], source: str, head: Head = LANGUAGE
) -> dict[str, torch.dtype]:
    """Refuse what the model did not take or did not get, say what its architecture ignores, and return the stored dtypes.

    Args:
        model: as `from_pretrained` gave it.
        report: its loading report, with `ignore_mismatched_sizes=True`.
        files: of `stored`; empty for a format that has been checked by its own reader (.gguf).
        head: whether what lies upon the base model may be new, and another one's be left in the file.

    Returns:
        name of a parameter or buffer -> the dtype it was stored in.

    Raises:
        ValueError: naming the tensors.
    """
    state = model.state_dict()
    taken = targets(model, files)
    dropped = {name for name, ours in taken.items() if not any(one in state for one in ours)}
    by_class = {name for name in dropped if not set(taken[name]) & set(report["unexpected_keys"])}
    spare = {name for name in dropped if _computed(name, files[name].shape)}
    spare |= {name for name in by_class if not _belongs_to_a_layer(model, taken[name][0])}
    spare |= {name for name in dropped if head.is_another(model, name)}
    unexpected = dropped - spare if files else set(map(str, report["unexpected_keys"]))
    refuse_sizes(report, source)
    missing = _missing(state, report, taken)
    new = {name for name in missing if head.may_be_new(model, name)}
    refuse_missing(missing - new, source, head.words)
    refuse_dropped(unexpected, type(model).__name__, source)
    if spare:
        print(f"qat: {source}: {type(model).__name__} has no use for {_listed(spare)} of the file", file=sys.stderr)
    if new:
        print(f"qat: {source} has no {head.words}: {', '.join(sorted(new))} are new and start at random", file=sys.stderr)
    _keep_apart(model, source)
    return _dtypes(state, taken, files, source)


def refuse_sizes(report: Mapping[str, Any], source: str) -> None:
    """Raise ValueError where the config asks for another shape than the file has."""
    wrong = sorted(report["mismatched_keys"], key=str)
    if wrong:
        name, found, wanted = wrong[0]
        more = f", and {len(wrong) - 1} more differ" if wrong[1:] else ""
        raise ValueError(f"{source}: {name} is {list(found)} in the file, but config.json asks for {list(wanted)}{more}")


def refuse_missing(names: Iterable[str], source: str, kind: str = LANGUAGE.words) -> None:
    """Raise ValueError for parameters that would start at random."""
    if missing := sorted(names):
        raise ValueError(f"{source} has no weights for {len(missing)} parameters of a {kind}: {', '.join(missing[:_NAMED])}")


def refuse_dropped(names: Iterable[str], kind: str, source: str) -> None:
    """Raise ValueError for tensors of the file for which the model has no place."""
    if dropped := sorted(names):
        raise ValueError(
            f"{source} holds {_listed(dropped)} for which {kind} has no place: without them it would be another model;"
            f" config.json belongs to another model, or is wrong about biases, layers or architectures"
        )


def gguf_unexpected(model: Any, report: Mapping[str, Any], architecture: str, names: Iterable[str]) -> set[str]:
    """What the model did not take of a .gguf file. transformers' older reader leaves it out of its report."""
    from transformers.integrations.gguf import is_gguf_arch_supported

    if is_gguf_arch_supported(architecture):
        return set(report["unexpected_keys"])
    import gguf

    arch = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        return set(report["unexpected_keys"])
    table = gguf.get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    known = {found for name in model.state_dict() if (found := table.get_name(name, (".weight", ".bias")))}
    layers = {name.rpartition(".")[0] for name in known}
    return {name for name in names if name not in known and name.rpartition(".")[0] in layers}


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return f"{len(ordered)} tensors ({', '.join(ordered[:_NAMED])}{more})" if ordered[1:] else f"the tensor {ordered[0]}"


def _computed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the tensor is a buffer that every model computes for itself."""
    return bool(_BUFFERS.search(name)) or (bool(_CAUSAL_MASK.search(name)) and len(shape) == 4)


def _belongs_to_a_layer(model: nn.Module, name: str) -> bool:
    """Whether the tensor is a further one of a layer that the model has: a bias, or a scale of its weight."""
    try:
        layer = model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return False
    return bool(name.rpartition(".")[0]) and isinstance(getattr(layer, "weight", None), nn.Parameter)


def _missing(state: Mapping[str, torch.Tensor], report: Mapping[str, Any], taken: Mapping[str, list[str]]) -> set[str]:
    """transformers leaves out of its report what the class says may be missing; a parameter may be only where it is tied."""
    missing = set(report["missing_keys"])
    if taken:
        got = {one for ours in taken.values() for one in ours if one in state}
        storages = {state[name].data_ptr() for name in got}
        parameters = {name for name, value in state.items() if value.is_floating_point() and value.numel()}
        missing |= {name for name in parameters - got if state[name].data_ptr() not in storages}
    return missing


def _keep_apart(model: Any, source: str) -> None:
    """Tied by the config, different in the file: transformers keeps both, so what is saved must not be tied, either."""
    for target, origin in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        one, two = model.get_parameter(target), model.get_parameter(origin)
        if one.data_ptr() != two.data_ptr():
            model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
            print(f"qat: {source}: {target} and {origin}, tied by its config, differ in the file: kept apart", file=sys.stderr)


def _dtypes(
    state: Mapping[str, torch.Tensor], taken: Mapping[str, list[str]], files: Mapping[str, Stored], source: str
) -> dict[str, torch.dtype]:
    found: dict[str, torch.dtype] = {}
    for name, ours in taken.items():
        dtype = files[name].dtype
        for one in (one for one in ours if one in state):
            if state[one].is_floating_point() and not dtype.is_floating_point:
                raise ValueError(
                    f"{source}: {name} is stored as {str(dtype).removeprefix('torch.')}: the checkpoint is quantized, and its"
                    " config.json does not say how; give the full-precision checkpoint"
                )
            found[one] = dtype if found.get(one, dtype) == dtype else torch.float32
    by_storage = {state[name].data_ptr(): dtype for name, dtype in found.items()}
    tied = {name: by_storage[value.data_ptr()] for name, value in state.items() if value.data_ptr() in by_storage}
    return tied | found
