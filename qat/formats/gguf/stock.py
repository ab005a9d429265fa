"""GGUF files by the `gguf` package: what we write, and passing copies that stock transformers can read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat.formats.gguf import i2s as gguf_i2s
from qat.formats.gguf import seal
from qat.formats.gguf.blocks import BLOCKS
from qat.formats.gguf.container import Tensor, read

_NEW = (BLOCKS["q1_0"].number, BLOCKS["q2_0"].number)  # which the gguf package cannot dequantize
_FLOAT16 = 1


def write(file: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file. Metadata: bool, int (uint32), float (float32), str, and lists of one of these (ints as int32)."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
    writer = GGUFWriter(None, architecture)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            large = isinstance(value, int) and not 0 <= value < 2**32
            writer.add_key_value(key, value, GGUFValueType.INT64 if large else kinds[type(value)])
    known = {int(number) for number in GGMLQuantizationType}
    for name, tensor in tensors.items():
        number: Any = GGMLQuantizationType(tensor.kind) if tensor.kind in known else tensor.kind
        # as int8, the writer does not look up the block sizes of types that it does not know
        writer.add_tensor(name, tensor.data.reshape(-1).view(np.int8), tensor.shape, number)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


@contextmanager
def stock_readable(file: str | Path, *, weights: bool = True) -> Iterator[str]:
    """The path of a file that stock transformers can read: this one, or a passing copy with Q2_0 and Q1_0 as float16.

    float16 holds them exactly: they are 0 or plus and minus the block's float16 scale. Without `weights` the copy has no tensors:
    enough for the tokenizer, and as quickly written for a model of any size.

    Raises:
        ValueError: the file is damaged or altered, or holds I2_S.
    """
    found = read(file)
    seal.seal(found).refuse(file)
    for name, tensor in found.tensors.items():
        if tensor.kind == gguf_i2s.NUMBER:
            raise ValueError(f"{file}: {name!r} is I2_S of bitnet.cpp, which neither transformers nor llama.cpp reads")
    if not any(tensor.kind in _NEW for tensor in found.tensors.values()):
        yield str(file)
        return
    plain = {
        name: _half(tensor.shape, found.float32(name)) if tensor.kind in _NEW else tensor
        for name, tensor in (found.tensors.items() if weights else ())
    }
    metadata = {key: value for key, value in found.metadata.items() if key not in ("general.architecture", seal.KEY)}
    with tempfile.TemporaryDirectory(prefix="qat-gguf-") as folder:
        copy = Path(folder, f"{Path(folder).name}.gguf")  # transformers prefers a file of that name in the working directory
        write(copy, found.metadata["general.architecture"], metadata, plain)
        yield str(copy)


def _half(shape: tuple[int, ...], values: NDArray[np.float32]) -> Tensor:
    return Tensor(shape, _FLOAT16, values.astype(np.float16).reshape(-1).view(np.uint8))
