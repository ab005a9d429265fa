"""What is in a model file or folder, whatever wrote it: its kind, its quantized layers as codes and scales, and the rest.

One reader a kind in the dict KINDS; the first whose test fits reads. Layers are read when asked for, one at a time.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.conversion.overrides import in_other_words, layer_config
from qat.formats.bitnet.reading import decode_layer
from qat.formats.folder import WEIGHTS, is_safetensors, one_line, read_metadata
from qat.formats.packed.manifest import METHOD, parse
from qat.formats.stored import INDEX, check_checksums, opened, own_tensors, read_shapes, stored_bytes, weight_files
from qat.quantizers.packing import unpack_ternary
from qat.quantizers.scales import scale_shape
from qat.storage import local


@dataclass(frozen=True)
class Codes:
    """A quantized layer: int8 `codes` [N, K], float32 `scale` [1 | N, 1 | G], which multiplies, its stored bytes, and in which
    dtype the file has the scale. `components` matrices lie side by side in `codes`."""

    codes: Tensor
    scale: Tensor
    bytes: int
    stored: torch.dtype = torch.float32
    components: int = 1


@dataclass
class Contents:
    """What was found. `layers` maps a name to the function that reads it; `others` a type to its tensors and their bytes;
    `folder` has the config.json, if there is one; `architecture` is the one of a GGUF file."""

    kind: str
    convention: str
    readers: str
    file_bytes: int
    layers: Mapping[str, Callable[[], Codes]] = field(default_factory=dict)
    others: dict[str, tuple[int, int]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    architecture: str | None = None


class Stored:
    """The tensors of some safetensors files, read one at a time."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.places = {name: (file, *about) for file in files for name, about in read_shapes(file).items()}
        self.bytes = sum(file.stat().st_size for file in files)

    def shape(self, name: str) -> list[int]:
        """A matrix's shape; ValueError where it is missing or no matrix."""
        if name not in self.places:
            raise ValueError(f"there is no tensor {name}")
        shape = self.places[name][2]
        if len(shape) != 2:
            raise ValueError(f"{name} is {shape}, not a matrix")
        return shape

    def tensor(self, name: str) -> Tensor:
        """One tensor; ValueError where it is missing."""
        if name not in self.places:
            raise ValueError(f"there is no tensor {name}")
        with opened(self.places[name][0]) as tensors:
            return tensors.get_tensor(name)

    def others(self, layers: Iterable[str]) -> dict[str, tuple[int, int]]:
        """dtype -> count and bytes of the tensors that belong to none of the quantized `layers`."""
        own = own_tensors(layers)
        found: dict[str, tuple[int, int]] = {}
        for name, (_, dtype, shape) in self.places.items():
            if name not in own:
                what = str(dtype).removeprefix("torch.")
                count, size = found.get(what, (0, 0))
                found[what] = (count + 1, size + stored_bytes([(dtype, shape)]))
        return found


def read(path: str | Path) -> Contents:
    """Find out what `path` is, and read its structure.

    Raises:
        ValueError: nothing is there, it is damaged, or it is of no kind in KINDS.
    """
    path = local(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    if path.is_file() and path.name == WEIGHTS and (path.parent / "config.json").is_file():
        path = path.parent
    for fits, reader in KINDS.values():
        if fits(path):
            return reader(path)
    raise ValueError(f"{path} is none of: {', '.join(KINDS)}")


def _is_run(path: Path) -> bool:
    return (path / "result.json").is_file()


def _read_run(folder: Path) -> Contents:
    result = _json(folder / "result.json")
    if not (folder / "packed").is_dir():
        raise ValueError(f"{folder} is a run without packed/: its status is {result.get('status')!r}")
    found = read(folder / "packed")
    perplexity = result.get("perplexity")
    stages = {k: v for k, v in perplexity.items() if isinstance(v, float)} if isinstance(perplexity, dict) else {}
    found.kind = f"a run's {found.kind}"
    found.facts |= {"run": f"{result.get('recipe', '')} {result.get('status', '')}".strip()}
    found.facts |= {f"perplexity, {stage}": f"{value:.6g}" for stage, value in stages.items()}
    return found


def _method(path: Path) -> str | None:
    """The quant_method in a folder's config.json; None where there is none."""
    if not (path / "config.json").is_file():
        return None
    said = _json(path / "config.json").get("quantization_config")
    if said is None:
        return None
    if not isinstance(said, dict) or not isinstance(said.get("quant_method"), str):
        raise ValueError(f"{path / 'config.json'}: quantization_config must be an object with a quant_method, not {said!r}"[:300])
    return said["quant_method"]


def _read_qat(folder: Path) -> Contents:
    said = _json(folder / "config.json")["quantization_config"]
    readers = "transformers after `import qat`; qat.evaluate, qat.export"
    found = _packed(weight_files(folder), said, "packed folder of qat", readers)
    found.folder = folder
    return found


def _read_state(file: Path) -> Contents:
    try:
        said = json.loads(read_metadata(file)["manifest"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its manifest is damaged: {one_line(error)}") from error
    return _packed([file], said, "tensors of a module packed by qat", "qat.formats.packed.folder.load_state")


def _packed(files: list[Path], said: object, kind: str, readers: str) -> Contents:
    record, widths = parse(said)
    quant, layout = record.config, str(record.layout)
    for file in files:
        check_checksums(file, own_tensors(widths))
    configs = {name: layer_config(quant, name) for name in widths}
    convention = f"{quant.words}, {layout}; weight_scale (float32) multiplies"
    stored = Stored(files)
    for name, k in widths.items():
        own = configs[name]
        shape = scale_shape(stored.shape(f"{name}.weight")[0], k, own.granularity, own.group_size, own.planes)
        if stored.shape(f"{name}.weight_scale") != list(shape):
            raise ValueError(f"{name}.weight_scale is {stored.shape(f'{name}.weight_scale')}, not {list(shape)}")
    layers = {name: partial(_packed_layer, stored, name, k, layout, configs[name].planes) for name, k in widths.items()}
    activations = f"int{quant.act_bits} per {quant.act_granularity}" if quant.act_bits else "floating point"
    activations += ", after a Hadamard rotation" if quant.act_hadamard else ""
    if epsilons := [one.rms_norm_eps for one in configs.values() if one.rms_norm_eps is not None]:
        where = "every layer" if len(epsilons) == len(configs) else f"{len(epsilons)} of {len(configs)} layers"
        activations = f"RMSNorm (eps {', '.join(f'{eps:g}' for eps in sorted(set(epsilons)))}) in {where}, then {activations}"
    facts = {"activations": activations, **in_other_words(quant, configs), "layers in full precision": str(len(record.skipped))}
    return Contents(kind, convention, readers, stored.bytes, layers, stored.others(layers), facts)


def _packed_layer(stored: Stored, name: str, k: int, layout: str, components: int) -> Codes:
    packed, scale = stored.tensor(f"{name}.weight"), stored.tensor(f"{name}.weight_scale")
    try:
        codes = unpack_ternary(packed, k * components, layout)
        return Codes(codes, scale.float(), packed.nbytes + scale.nbytes, components=components)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _read_bitnet(folder: Path) -> Contents:
    said, stored = _json(folder / "config.json")["quantization_config"], Stored(weight_files(folder))
    auto = said.get("linear_class", "bitlinear") == "autobitlinear"
    if auto and said.get("quantization_mode") == "online":
        kind, convention = "bitnet folder, online: latent weights", "scales are derived from the weights at every forward"
        return Contents(kind, convention, "transformers; qat.formats.bitnet.reading", stored.bytes, {}, stored.others(()))
    convention = (
        "autobitlinear: weight_scale multiplies, the bias too" if auto else "bitlinear: weight_scale divides (1 / mean|W|)"
    )
    names = [name.removesuffix(".weight_scale") for name in stored.places if name.endswith(".weight_scale")]
    layers = {name: partial(_bitnet_layer, stored, name, auto) for name in names}
    readers = "transformers; qat.evaluate, qat.formats.bitnet.reading"
    found = Contents("stock bitnet folder", convention, readers, stored.bytes, layers, stored.others(layers), folder=folder)
    if said.get("use_rms_norm"):
        found.facts["activations"] = "RMSNorm in every layer, then int8 per token"
    return found


def _bitnet_layer(stored: Stored, name: str, multiplies: bool) -> Codes:
    weight, scale = stored.tensor(f"{name}.weight"), stored.tensor(f"{name}.weight_scale")
    n, k = stored.shape(f"{name}.weight")
    rows = n * 4 if weight.dtype == torch.uint8 else n
    return Codes(*decode_layer(weight, scale, rows, k, multiplies, name), weight.nbytes + scale.nbytes, scale.dtype)


def _read_plain(path: Path) -> Contents:
    method = _method(path) if path.is_dir() else None
    stored = Stored(weight_files(path) if path.is_dir() else [path])
    kind = "full precision" if method is None else f"quantized by {method}, which qat does not read"
    readers = "transformers" if path.is_dir() else "any safetensors reader"
    return Contents(f"safetensors, {kind}", "no codes", readers, stored.bytes, {}, stored.others(()))


def _read_gguf(file: Path) -> Contents:
    """Layers have GGUF's names, and rows in its order (llama's query and key rows are permuted there)."""
    from qat.formats.gguf import container as gguf_file
    from qat.formats.gguf import i2s as gguf_i2s
    from qat.formats.gguf.blocks import NAMES

    try:
        whole = gguf_file.read(file)
        order = whole.metadata.get(gguf_i2s.ORDER_KEY)
        blocks = NAMES | ({gguf_i2s.NUMBER: str(order)} if order else {})
        layers = {
            name.removesuffix(".weight"): partial(_gguf_layer, name, tensor, blocks[tensor.kind])
            for name, tensor in whole.tensors.items()
            if tensor.kind in blocks
        }
        convention, readers = "scales are in the blocks, float16", "llama.cpp and what builds on it"
        if order:
            convention, readers = f"one float32 scale a tensor, behind its codes in the order of {order}", "bitnet.cpp"
        found = Contents("GGUF", convention, readers, file.stat().st_size, layers)
        for tensor in whole.tensors.values():
            if tensor.kind not in blocks:
                kind = gguf_file.kind_name(tensor.kind)
                count, size = found.others.get(kind, (0, 0))
                found.others[kind] = (count + 1, size + tensor.data.nbytes)
        types = Counter(gguf_file.kind_name(tensor.kind) for tensor in whole.tensors.values() if tensor.kind in blocks)
    except ImportError as error:
        raise ValueError(f"{file} needs the package gguf: pip install -e .[gguf]") from error
    found.facts["architecture"] = found.architecture = str(whole.metadata.get("general.architecture"))
    if types:
        found.facts["types"] = ", ".join(f"{count} {name}" for name, count in sorted(types.items()))
    return found


def _read_pt2(file: Path) -> Contents:
    """A program, whose codes are among its constants under names of torch's."""
    from qat.formats.pt2.program import kind_of

    try:
        kind = kind_of(file)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is not a whole .pt2 file: {error}") from error
    return Contents(f".pt2, {kind}", "a program", "torch without transformers: qat.formats.pt2.load", file.stat().st_size)


def _gguf_layer(name: str, tensor: Any, kind: str) -> Codes:
    """`kind` is a block type, or the order of I2_S."""
    from qat.formats.gguf import blocks as gguf_blocks
    from qat.formats.gguf import i2s as gguf_i2s

    size = tensor.data.nbytes
    try:
        if tensor.kind == gguf_i2s.NUMBER:
            codes, one = gguf_i2s.decode(tensor.data, tensor.shape, kind)
            return Codes(torch.from_numpy(codes), torch.tensor([[float(one)]]), size)
        codes, scale = gguf_blocks.decode(tensor.data.reshape(tensor.shape[0], -1), kind)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
    return Codes(torch.from_numpy(codes), torch.from_numpy(scale.astype("float32")), size, torch.float16)


KINDS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Contents]]] = {
    "a run's folder": (_is_run, _read_run),
    "a GGUF file": (lambda path: path.is_file() and path.suffix == ".gguf", _read_gguf),
    "a .pt2 file": (lambda path: path.is_file() and path.suffix == ".pt2", _read_pt2),
    "a packed folder of qat": (lambda path: _method(path) == METHOD, _read_qat),
    "a stock bitnet folder": (lambda path: _method(path) == "bitnet", _read_bitnet),
    "a packed safetensors file of qat": (lambda path: is_safetensors(path) and "manifest" in read_metadata(path), _read_state),
    "a safetensors file": (is_safetensors, _read_plain),
    "a transformers folder": (lambda path: any((path / name).is_file() for name in (WEIGHTS, INDEX)), _read_plain),
}


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object")
    return found
