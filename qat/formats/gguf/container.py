"""The GGUF container: a strict reader, which believes nothing that a file says about itself. `stock` writes files.

Why our own reader: gguf 0.19 knows no Q2_0, and it takes lengths and offsets as they come. Here every length is checked against
the file, tensors must follow one another without gap or overlap (as llama.cpp demands), and a tensor's type must fit its size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qat.formats.gguf import i2s as gguf_i2s
from qat.formats.gguf.blocks import BLOCKS, NAMES, OLD_Q2_0, decode, dequantize
from qat.formats.gguf.cursor import Cursor

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
WRITER_KEY = "qat.version"
_MOST_DIMENSIONS = 4


class Tensor(NamedTuple):
    """One tensor as it lies in the file: shape with the row width last, type number and bytes."""

    shape: tuple[int, ...]
    kind: int
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class GGUFFile:
    """What a file holds."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    places: dict[str, slice] = field(default_factory=dict)
    """Where the type and value of each metadata key lie in `data`."""
    data: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    version: int = VERSIONS[-1]

    def check_codes(self) -> None:
        """ValueError for a ternary or binary tensor with bytes that no writer produces, or a scale that is not finite."""
        for name, tensor in self.tensors.items():
            if tensor.kind in NAMES:
                self.float32(name)

    def float32(self, name: str, order: str = "x86") -> NDArray[np.float32]:
        """A tensor dequantized; `order` is the machine that an I2_S file was written for.

        Raises:
            ValueError: a type that cannot be dequantized, or bytes that no writer of its type produces.
        """
        tensor = self.tensors[name]
        try:
            return _dequantize(tensor, order)
        except (ValueError, NotImplementedError) as error:  # the latter: gguf knows the type's size, but not its codec
            raise ValueError(f"tensor {name!r} {error}") from error


def _dequantize(tensor: Tensor, order: str) -> NDArray[np.float32]:
    from gguf import GGMLQuantizationType, quants

    if tensor.kind == gguf_i2s.NUMBER:
        t, scale = gguf_i2s.decode(tensor.data, (tensor.shape[0], tensor.shape[1]), order)
        return dequantize(t, np.full((1, 1), scale))
    if tensor.kind in NAMES:
        rows = tensor.data.reshape(int(np.prod(tensor.shape[:-1])), -1)
        return dequantize(*decode(rows, NAMES[tensor.kind])).reshape(tensor.shape)
    rows = tensor.data.reshape(*tensor.shape[:-1], -1)
    values = quants.dequantize(rows, GGMLQuantizationType(tensor.kind)).reshape(tensor.shape)
    if not np.isfinite(values).all():
        raise ValueError("holds values that are not finite")
    return values.astype(np.float32, copy=False)


def block_size(kind: int) -> tuple[int, int] | None:
    """(weights, bytes) of a block of type number `kind`; None for a type that is not known."""
    from gguf import GGML_QUANT_SIZES

    if kind in NAMES:
        block = BLOCKS[NAMES[kind]]
        return block.weights, block.bytes
    sizes = {int(number): size for number, size in GGML_QUANT_SIZES.items()}
    return sizes.get(kind)


def kind_name(kind: int) -> str:
    """What llama.cpp, or bitnet.cpp, calls the type of that number."""
    from gguf import GGMLQuantizationType

    if kind == gguf_i2s.NUMBER:
        return "I2_S"
    return NAMES[kind].upper() if kind in NAMES else GGMLQuantizationType(kind).name


def read(file: str | Path) -> GGUFFile:
    """Everything in a file; tensors are views of the mapped file.

    Raises:
        ValueError: naming the file: missing, no GGUF file, truncated, contradicting itself, or with Q2_0 blocks of 128.
    """
    try:
        data = np.memmap(file, np.uint8, "r")
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise ValueError(f"cannot read {file}: {error}") from error
    try:
        return parse(data)
    except ValueError as error:
        raise ValueError(f"{file} is not a whole GGUF file: {error}") from error


def parse(data: NDArray[np.uint8]) -> GGUFFile:
    """`read` for bytes in memory."""
    cursor = Cursor(data.data, 0)
    if cursor.take(4, "magic") != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.scalar("I", "version")
    if version not in VERSIONS:
        raise ValueError(f"version {version} is not supported, only {VERSIONS}")
    tensor_count, pair_count = cursor.scalar("Q", "tensor count"), cursor.scalar("Q", "metadata count")
    cursor.expect(tensor_count * 24 + pair_count * 12, "tensors and metadata")
    metadata, places = _read_metadata(cursor, pair_count)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > len(data):
        raise ValueError(f"general.alignment is {alignment!r}, not a power of two within the file")
    infos = _read_infos(cursor, tensor_count)
    start = _padded(cursor.at, alignment)
    return GGUFFile(metadata, _locate(data, infos, start, alignment), places, data, version)


class _Info(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _read_metadata(cursor: Cursor, count: int) -> tuple[dict[str, Any], dict[str, slice]]:
    """key -> value, and where it lies."""
    metadata: dict[str, Any] = {}
    places: dict[str, slice] = {}
    for _ in range(count):
        key = cursor.string("a key")
        if key in metadata:
            raise ValueError(f"the key {key!r} appears twice")
        begin = cursor.at
        metadata[key] = cursor.value(cursor.scalar("I", key), key)
        places[key] = slice(begin, cursor.at)
    return metadata, places


def _read_infos(cursor: Cursor, count: int) -> list[_Info]:
    infos: dict[str, _Info] = {}
    for _ in range(count):
        name = cursor.string("a tensor's name")
        if name in infos:
            raise ValueError(f"the tensor {name!r} appears twice")
        dimensions = cursor.scalar("I", name)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions; allowed are 1 to {_MOST_DIMENSIONS}")
        shape = tuple(cursor.scalar("Q", name) for _ in range(dimensions))[::-1]
        infos[name] = _Info(name, shape, cursor.scalar("I", name), cursor.scalar("Q", name))
    return list(infos.values())


def _locate(data: NDArray[np.uint8], infos: list[_Info], start: int, alignment: int) -> dict[str, Tensor]:
    tensors, offset = {}, 0
    for i, info in enumerate(infos):
        following = infos[i + 1].offset if i + 1 < len(infos) else len(data) - start
        size = _byte_count(info)
        if info.kind == BLOCKS["q2_0"].number:
            _refuse_old_q2_0(info, following - info.offset, size, alignment)
        if info.offset != offset:
            raise ValueError(f"tensor {info.name!r} lies at {info.offset}, but the tensors before it end at {offset}")
        if start + offset + size > len(data):
            raise ValueError(f"tensor {info.name!r} ends {start + offset + size - len(data)} bytes behind the end of the file")
        tensors[info.name] = Tensor(info.shape, info.kind, data[start + offset : start + offset + size])
        if data[start + offset + size : start + offset + _padded(size, alignment)].any():
            raise ValueError(
                f"the padding behind tensor {info.name!r} is not zero, so the tensor is larger than its type {info.kind}"
            )
        offset += _padded(size, alignment)
    if len(data) > start + offset:
        raise ValueError(f"{len(data) - start - offset} bytes follow the last tensor")
    return tensors


def _byte_count(info: _Info) -> int:
    weights = 1
    for width in info.shape:
        weights *= width
    if weights == 0:
        raise ValueError(f"tensor {info.name!r} of shape {list(info.shape)} is empty")
    if info.kind == gguf_i2s.NUMBER:
        if weights % 4 or len(info.shape) != 2:
            raise ValueError(f"tensor {info.name!r} of shape {list(info.shape)} cannot be I2_S")
        return weights // 4 + gguf_i2s.TRAILER
    size = block_size(info.kind)
    if size is None:
        raise ValueError(f"tensor {info.name!r} has the unknown type {info.kind}")
    if info.shape[-1] % size[0]:
        raise ValueError(f"tensor {info.name!r}: rows of {info.shape[-1]} are no multiple of type {info.kind}'s {size[0]}")
    return weights // size[0] * size[1]


def _refuse_old_q2_0(info: _Info, room: int, size: int, alignment: int) -> None:
    """Old files carry the same number for blocks of 128: they leave less room than blocks of 64 need, and just enough."""
    weights, per_block = OLD_Q2_0
    old = size // BLOCKS["q2_0"].bytes * BLOCKS["q2_0"].weights // weights * per_block
    if old <= room < min(size, old + alignment):
        raise ValueError(
            f"tensor {info.name!r} is Q2_0 with 128 weights a block, an old fork's type under the number of today's (64 a block);"
            " readers of today take it for garbage; convert it with the fork that wrote it"
        )


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
