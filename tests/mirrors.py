"""The structs of csrc/cuda/kernels.h for ctypes, and their check against the compiled ones.

A mirror that is wrong would not fail but read other bytes. So tests/emulation.cpp says each struct's size and each field's
place (it does not compile where a field is missing in its list), and `check` compares them when the library is loaded.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_bool, c_float, c_int, c_int64, c_void_p
from itertools import zip_longest


class QuantizeActivation(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("dtype", c_int),
        ("m", c_int64),
        ("k", c_int64),
        ("per_tensor", c_bool),
        ("eps", c_float),
        ("norm_weight", c_void_p),
        ("norm_eps", c_float),
        ("codes", c_void_p),
        ("divisor", c_void_p),
        ("scale", c_void_p),
        ("workspace", c_void_p),
    ]


class QuantizeWeight(Structure):
    _fields_ = [
        ("w", c_void_p),
        ("dtype", c_int),
        ("n", c_int64),
        ("k", c_int64),
        ("groups", c_int64),
        ("granularity", c_int),
        ("reduce", c_int),
        ("binary", c_bool),
        ("scale_dtype", c_int),
        ("eps", c_float),
        ("t", c_void_p),
        ("packed", c_void_p),
        ("scale", c_void_p),
        ("workspace", c_void_p),
    ]


class Output(Structure):
    _fields_ = [("y", c_void_p), ("dtype", c_int), ("scale", c_void_p), ("scale_stride", c_int64), ("bias", c_void_p)]


class Linear(Structure):
    _fields_ = [
        ("codes", c_void_p),
        ("divisor", c_void_p),
        ("t", c_void_p),
        ("m", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("groups", c_int64),
        ("out", Output),
        ("raw", c_bool),
        ("partial", c_void_p),
    ]


class PackedLinear(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("per_tensor", c_bool),
        ("eps", c_float),
        ("packed", c_void_p),
        ("m", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("groups", c_int64),
        ("out", Output),
        ("codes", c_void_p),
        ("divisor", c_void_p),
        ("workspace", c_void_p),
        ("partial", c_void_p),
        ("overlap", c_bool),
    ]


MIRRORS = [QuantizeActivation, QuantizeWeight, Output, Linear, PackedLinear]


def layout(mirror: type[Structure]) -> str:
    """`NAME SIZE`, then ` FIELD:OFFSET:SIZE` of each field in order: what `emulation_layouts` says of the compiled struct."""
    fields = [(field[0], getattr(mirror, field[0])) for field in mirror._fields_]
    return " ".join([f"{mirror.__name__} {ctypes.sizeof(mirror)}", *(f"{name}:{at.offset}:{at.size}" for name, at in fields)])


def check(library: ctypes.CDLL, mirrors: list[type[Structure]]) -> None:
    """Raise AssertionError unless the mirrors are the library's structs, field by field."""
    library.emulation_layouts.restype = ctypes.c_char_p
    compiled = {line.partition(" ")[0]: line for line in library.emulation_layouts().decode().splitlines()}
    unpaired = compiled.keys() ^ {mirror.__name__ for mirror in mirrors}
    assert not unpaired, f"structs without a mirror, or mirrors without a struct: {unpaired}"
    for mirror in mirrors:
        mine, theirs = (text.split() for text in (layout(mirror), compiled[mirror.__name__]))
        different = [f"{a} is {b} in C++" for a, b in zip_longest(mine, theirs, fillvalue="nothing") if a != b]
        assert not different, f"the mirror of {mirror.__name__} is wrong: {', '.join(different)}"
