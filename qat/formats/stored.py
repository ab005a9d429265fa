"""The safetensors files of a packed model: names, metadata with a checksum for each tensor, and what they claim to hold.

The checksum is a CRC-32 over dtype, shape and bytes, by name: a flipped bit is an error, not a slightly worse model. Tensors
that other writers renamed or added have none and are not checked.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as write_tensors
from torch import Tensor, nn

from qat.conversion.layers import packed_layers, parameter_count
from qat.formats.folder import WEIGHTS, WRITER, read_metadata

INDEX = "model.safetensors.index.json"
CHECKSUMS = "crc32"
_PIECE = 1 << 18  # bytes
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that the index beside it names; ValueError where they are missing or elsewhere."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(f"{folder / WEIGHTS} is missing")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}, which is no safetensors file of this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
    return [folder / name for name in names]


def save_file(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its contents alone: the library orders the metadata by chance.

    Raises:
        OSError: the disk refuses; SafetensorError where the library meets it.
    """
    write_tensors(dict(tensors), file, dict(metadata))
    with file.open("r+b") as written:
        (length,) = struct.unpack("<Q", written.read(8))
        header = json.loads(written.read(length))
        ordered = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items())), **header}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) != length:
            raise OSError(f"{file} has a header that is not written as JSON is")
        written.seek(8)
        written.write(text)


def file_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that they have in files: a packed layer's codes are its `weight`."""
    renamed = {f"{name}.packed".lstrip("."): f"{name}.weight".lstrip(".") for name in packed_layers(model)}
    return {renamed.get(name, name): tensor for name, tensor in tensors.items()}


def module_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `file_names`."""
    renamed = {f"{name}.weight".lstrip("."): f"{name}.packed".lstrip(".") for name in packed_layers(model)}
    return {renamed.get(name, name): tensor for name, tensor in tensors.items()}


def own_tensors(layers: Iterable[str]) -> set[str]:
    """The names that the tensors of quantized layers may have in files."""
    return {f"{name}.{key}" for name in layers for key in ("weight", "weight_scale", "bias", "rms_norm.weight")}


def file_metadata(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Who wrote it, how many parameters the full-precision model has (tied ones once), and the checksums."""
    checksums = {name: checksum(tensor) for name, tensor in tensors.items() if not tensor.is_meta}
    return {"format": "pt", **WRITER, "parameters": str(parameter_count(model)), CHECKSUMS: json.dumps(checksums)}


def checksum(tensor: Tensor) -> str:
    """Eight hexadecimal digits."""
    tensor = tensor.detach().cpu().contiguous()
    about = f"{tensor.dtype} {list(tensor.shape)}".encode()
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # a buffer, of which numpy's types do not tell
    return f"{zlib.crc32(data, zlib.crc32(about)):08x}"


def check_checksums(file: Path, required: Container[str]) -> None:
    """Raise ValueError naming the first tensor whose bytes are not those that were written.

    A file that has checksums must have one for each of its tensors that are `required` to.
    """
    text = read_metadata(file).get(CHECKSUMS)
    if text is None:
        return
    try:
        expected = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: its checksums are damaged: {error}") from error
    shapes = read_shapes(file)
    for name in shapes:
        if name not in expected and name in required:
            raise ValueError(f"{file}: {name!r} has no checksum")
    for name, found in _stored_checksums(file, {name: shapes[name] for name in shapes if name in expected}):
        if found != expected[name]:
            raise ValueError(f"{file}: {name!r} is damaged: its checksum is not the one that was written")


def _stored_checksums(file: Path, shapes: Mapping[str, tuple[torch.dtype | str, list[int]]]) -> Iterator[tuple[str, str]]:
    """`checksum` of tensors of a whole safetensors file, read piece by piece: a mapped file would stay in memory."""
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(length))
        for name, (dtype, shape) in shapes.items():
            begin, end = header[name]["data_offsets"]
            data.seek(8 + length + begin)
            found = zlib.crc32(f"{dtype} {shape}".encode())
            for at in range(begin, end, _PIECE):
                found = zlib.crc32(data.read(min(_PIECE, end - at)), found)
            yield name, f"{found:08x}"


def stored_bytes(shapes: Iterable[tuple[torch.dtype | str, list[int]]]) -> int:
    """Bytes of tensors of these dtypes and shapes; those of a dtype that torch does not have count one byte a value."""
    return sum(torch.Size(s).numel() * (d.itemsize if isinstance(d, torch.dtype) else 1) for d, s in shapes)


def read_shapes(file: Path) -> dict[str, tuple[torch.dtype | str, list[int]]]:
    """name -> dtype and shape of every tensor in the file, without reading any."""
    with opened(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {name: (_DTYPES.get(s.get_dtype(), s.get_dtype()), s.get_shape()) for name, s in slices.items()}


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file; ValueError naming it when it is truncated or none."""
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
