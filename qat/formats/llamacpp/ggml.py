"""The block codecs of ggml, llama.cpp's tensor library, by ctypes: for the type that the `gguf` package cannot write (Q6_K), and
to check ours. The libraries come with the optional package llama-cpp-python.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

INSTALL = "make llama-cpp, or pip install llama-cpp-python, which compiles llama.cpp: cmake and g++, 6 minutes on 2 cores"


def version() -> str | None:
    """The installed llama-cpp-python's version, or None."""
    from importlib import metadata

    try:
        return metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        return None


@cache
def library(name: str) -> ctypes.CDLL:
    """The library ggml-`name` (base, cpu); ValueError where llama-cpp-python is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"llama-cpp-python is not installed: {INSTALL}")
    folder = Path(list(spec.submodule_search_locations)[0]) / "lib"
    return ctypes.CDLL(str(min(folder.glob(f"*ggml-{name}.*"))))


def quantize(values: NDArray[np.float32], number: int) -> NDArray[np.uint8]:
    """Rows of values [N, K] as ggml's blocks of the type of that number. ValueError without llama-cpp-python."""
    base = library("base")
    values = np.ascontiguousarray(values, np.float32)
    n, k = values.shape
    base.ggml_row_size.restype = base.ggml_quantize_chunk.restype = ctypes.c_size_t
    row = int(base.ggml_row_size(ctypes.c_int(number), ctypes.c_int64(k)))
    out = np.empty(n * row, np.uint8)
    where = (ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(out.ctypes.data))
    written = base.ggml_quantize_chunk(
        ctypes.c_int(number), *where, ctypes.c_int64(0), ctypes.c_int64(n), ctypes.c_int64(k), ctypes.c_void_p()
    )
    assert written == len(out), (written, len(out))
    return out


def dequantize(data: NDArray[np.uint8], name: str, count: int) -> NDArray[np.float32]:
    """`count` weights of ggml's blocks of the type `name` (as ggml spells it: q2_0, tq1_0, q6_K), by ggml's own code."""
    out = np.empty(count, np.float32)
    data = np.ascontiguousarray(data)
    function = getattr(library("base"), f"dequantize_row_{name}")
    function.restype = None
    function(ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(count))
    return out
