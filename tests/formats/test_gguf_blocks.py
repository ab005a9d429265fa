"""Block layouts of GGUF, and I2_S, against scalar references, the gguf package and ggml itself."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from gguf_samples import needs_llama_cpp, random_rows

from qat.formats.gguf import blocks as gguf_blocks
from qat.formats.gguf import i2s as gguf_i2s
from qat.formats.gguf.blocks import BLOCKS, decode, encode
from qat.formats.llamacpp import ggml


def scalar_weight(name: str, block: bytes, n: int) -> float:
    """Weight n of a block, by the type's definition, one at a time."""
    if name == "q2_0":
        d, q = struct.unpack("<e", block[:2])[0], block[2 + n // 4] >> 2 * (n % 4) & 3
        return (q - 1) * d
    if name == "q1_0":
        d, bit = struct.unpack("<e", block[:2])[0], block[2 + n // 8] >> n % 8 & 1
        return d if bit else -d
    d = struct.unpack("<e", block[-2:])[0]
    if name == "tq2_0":
        return ((block[32 * (n // 128) + n % 32] >> 2 * (n % 128 // 32) & 3) - 1) * d
    if n < 160:
        byte, digit = block[n % 32], n // 32
    elif n < 240:
        byte, digit = block[32 + (n - 160) % 16], (n - 160) // 16
    else:
        byte, digit = block[48 + (n - 240) % 4], (n - 240) // 4
    return (((byte * 3**digit & 255) * 3 >> 8) - 1) * d


@pytest.mark.parametrize("name", BLOCKS)
def test_every_weight_of_a_block_lies_where_the_type_says(name: str) -> None:
    t, d = random_rows(name)
    kind, rows = BLOCKS[name], encode(t, d, name)
    assert rows.shape == (3, 2 * kind.bytes) and rows.dtype == np.uint8
    for row, codes, scales in zip(rows, t, d, strict=True):
        for n, code in enumerate(codes):
            block = row[n // kind.weights * kind.bytes :][: kind.bytes].tobytes()
            assert scalar_weight(name, block, n % kind.weights) == code * float(scales[n // kind.weights])
    again, scales = decode(rows, name)
    assert np.array_equal(again, t) and np.array_equal(scales, d)


@pytest.mark.parametrize("name", ["tq1_0", "tq2_0"])
def test_stock_codecs_write_and_read_the_same_bytes(name: str) -> None:
    t, d = random_rows(name)
    number = GGMLQuantizationType(BLOCKS[name].number)
    values, rows = gguf_blocks.dequantize(t, d), encode(t, d, name)
    assert np.array_equal(quants.quantize(values, number), rows)
    assert np.array_equal(quants.dequantize(rows, number), values)


@needs_llama_cpp
@pytest.mark.parametrize("name", BLOCKS)
def test_ggml_reads_the_same_weights(name: str) -> None:
    t, d = random_rows(name, n=5, blocks=3)
    values = ggml.dequantize(encode(t, d, name), name, t.size).reshape(t.shape)
    assert np.array_equal(values, gguf_blocks.dequantize(t, d))


@needs_llama_cpp
@pytest.mark.parametrize("name", BLOCKS)
def test_ggml_writes_the_same_blocks(name: str) -> None:
    t, d = random_rows(name)
    t[:, :: BLOCKS[name].weights] = 1  # ggml takes the scale from the largest weight
    values = gguf_blocks.dequantize(t, d)
    written = ggml.quantize(values, BLOCKS[name].number).reshape(len(t), -1)
    assert np.array_equal(gguf_blocks.dequantize(*decode(written, name)), values)


@pytest.mark.parametrize(
    ("name", "t", "d", "message"),
    [
        ("q2_0", np.zeros((1, 96), np.int8), np.ones((1, 1), np.float16), "96 weights is no multiple of the 64"),
        ("q1_0", np.zeros((1, 128), np.int8), np.ones((1, 1), np.float16), "do not fit q1_0"),
        ("q2_0", np.full((1, 64), 2, np.int8), np.ones((1, 1), np.float16), "do not fit q2_0"),
        ("q2_0", np.zeros((1, 64), np.int8), np.ones((1, 2), np.float16), r"d must be float16 \[1, 1\]"),
        ("q2_0", np.zeros((1, 64), np.int8), np.full((1, 1), np.inf, np.float16), "not finite"),
    ],
)
def test_what_a_block_cannot_hold(name: str, t: np.ndarray, d: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(t, d, name)


@pytest.mark.parametrize("name", ["q2_0", "tq2_0"])
def test_code_3_is_refused(name: str) -> None:
    rows = encode(*random_rows(name), name)
    rows[1, 5] |= 3
    with pytest.raises(ValueError, match="code 3"):
        decode(rows, name)


def test_base_3_bytes_that_no_writer_produces_are_refused() -> None:
    t, d = random_rows("tq1_0")
    used = set(np.unique((np.arange(243) * 256 + 242) // 243).tolist())
    rows = encode(t, d, "tq1_0")
    rows[0, 0] = min(set(range(256)) - used)
    with pytest.raises(ValueError, match="base-3"):
        decode(rows, "tq1_0")


@pytest.mark.parametrize(("order", "stride"), [("x86", 32), ("arm", 16)])
def test_i2_s_bytes(order: str, stride: int) -> None:
    t = np.random.default_rng(0).integers(-1, 2, (3, 256)).astype(np.int8)
    data = gguf_i2s.encode(t, 0.37, order)
    assert data.shape == (3 * 256 // 4 + 32,) and struct.unpack("<f", data[192:196].tobytes())[0] == np.float32(0.37)
    assert not data[196:].any()
    flat = t.reshape(-1)
    for n, code in enumerate(flat):
        block, within = divmod(n, 4 * stride)
        assert data[block * stride + within % stride] >> 6 - 2 * (within // stride) & 3 == code + 1
    again, scale = gguf_i2s.decode(data, t.shape, order)
    assert np.array_equal(again, t) and scale == np.float32(0.37)
    with pytest.raises(ValueError, match="code 3"):
        gguf_i2s.decode(np.full(224, 255, np.uint8), t.shape, order)
    with pytest.raises(ValueError, match="no multiple"):
        gguf_i2s.encode(t[:, :96], 1.0, order)
