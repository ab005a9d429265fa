"""One linear layer as llama.cpp computes it, for `qat.bench`: by ggml, llama.cpp's tensor library.

The weight is quantized by ggml and multiplied by its own graph, activations quantized inside as always there.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qat.formats.llamacpp import ggml

TYPES = {"F32": 0, "TQ2_0": 35}


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@cache
def _library() -> ctypes.CDLL:
    """ggml-cpu, which brings ggml-base along, with the signatures used here."""
    library = ggml.library("cpu")
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    for name, result, *arguments in (
        ("ggml_cpu_init", None),
        ("ggml_init", pointer, _InitParams),
        ("ggml_free", None, pointer),
        ("ggml_new_tensor_2d", pointer, pointer, number, size, size),
        ("ggml_mul_mat", pointer, pointer, pointer, pointer),
        ("ggml_new_graph", pointer, pointer),
        ("ggml_build_forward_expand", None, pointer, pointer),
        ("ggml_graph_compute_with_ctx", number, pointer, pointer, number),
        ("ggml_get_data", pointer, pointer),
        ("ggml_quantize_chunk", ctypes.c_size_t, number, pointer, pointer, size, size, size, pointer),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.ggml_cpu_init()
    return library


class GgmlLinear:
    """y [M, N] = x [M, K] @ w^T for a random ternary w [N, K] in a ggml type; M is that of the first call."""

    def __init__(self, n: int, k: int, kind: str) -> None:
        if k % 256:  # ggml ends the process otherwise
            raise RuntimeError(f"{kind} holds rows of a multiple of 256 weights, not {k}")
        self.ggml, self.n, self.k = _library(), n, k
        self.weight_memory = self._context(n * k * (4 if kind == "F32" else 1) + (1 << 20))
        self.weight = self.ggml.ggml_new_tensor_2d(self.weight_memory, TYPES[kind], k, n)
        w = torch.randint(-1, 2, (n, k)).float()
        self.ggml.ggml_quantize_chunk(TYPES[kind], w.data_ptr(), self.ggml.ggml_get_data(self.weight), 0, n, k, None)
        self.memory: Any = None

    def _context(self, size: int) -> Any:
        return self.ggml.ggml_init(_InitParams(size, None, False))

    def _prepare(self, m: int) -> None:
        # Every computation takes its work buffer from this memory and never gives it back.
        self.room = m * (self.n * 4 + self.k * 5) + (64 << 20)
        self.memory = self._context(self.room)
        self.x = self.ggml.ggml_new_tensor_2d(self.memory, TYPES["F32"], self.k, m)
        self.y = self.ggml.ggml_mul_mat(self.memory, self.weight, self.x)
        self.graph = self.ggml.ggml_new_graph(self.memory)
        self.ggml.ggml_build_forward_expand(self.graph, self.y)
        self.calls = (48 << 20) // (m * self.k * 5 + 4096)

    def __call__(self, x: Tensor) -> Tensor:
        if self.memory is None or self.calls == 0:
            self._free()
            self._prepare(x.shape[0])
        self.calls -= 1
        ctypes.memmove(self.ggml.ggml_get_data(self.x), x.data_ptr(), x.numel() * 4)
        self.ggml.ggml_graph_compute_with_ctx(self.memory, self.graph, torch.get_num_threads())
        y = torch.empty(x.shape[0], self.n)
        ctypes.memmove(y.data_ptr(), self.ggml.ggml_get_data(self.y), y.numel() * 4)
        return y

    def _free(self) -> None:
        if self.memory is not None:
            self.ggml.ggml_free(self.memory)
            self.memory = None

    def __del__(self) -> None:
        if hasattr(self, "memory"):
            self._free()
            self.ggml.ggml_free(self.weight_memory)
