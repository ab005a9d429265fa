"""Byte layouts: exact bytes worked out by hand, round trips for odd shapes, and what is refused."""

from __future__ import annotations

import pytest
import torch

from qat.quantizers.layouts import LAYOUTS
from qat.quantizers.packing import KERNEL_LAYOUTS, check_packed, pack_ternary, unpack_ternary

ROW = [-1, 0, 1, 1, -1, 1, 0]


def row(*values: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.tensor([values], dtype=dtype)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("2bit", [0 + (1 << 2) + (2 << 4) + (2 << 6), 0 + (2 << 2) + (1 << 4) + (1 << 6)]),
        ("base3", [0 + 1 * 3 + 2 * 9 + 2 * 27 + 0 * 81, 2 + 1 * 3 + 1 * 9 + 1 * 27 + 1 * 81]),
    ],
)
def test_bytes_are_those_worked_out_by_hand(layout: str, expected: list[int]) -> None:
    packed = pack_ternary(row(*ROW), layout)
    assert packed.dtype == torch.uint8 and packed.tolist() == [expected]


@pytest.mark.parametrize(
    ("layout", "t", "byte"),
    [("2bit", 1, 0b10101010), ("2bit", 0, 0b01010101), ("2bit", -1, 0), ("base3", 1, 242), ("base3", 0, 121), ("base3", -1, 0)],
)
def test_a_byte_of_equal_codes(layout: str, t: int, byte: int) -> None:
    assert pack_ternary(row(*[t] * LAYOUTS[layout].weights), layout).tolist() == [[byte]]


@pytest.mark.parametrize(("layout", "byte"), [("2bit", 0b01010100), ("base3", 120)])
def test_padding_is_the_digit_of_the_zero_weight(layout: str, byte: int) -> None:
    assert pack_ternary(row(-1), layout).tolist() == [[byte]]
    assert unpack_ternary(pack_ternary(row(-1), layout), LAYOUTS[layout].weights, layout)[0, 1:].tolist().count(0) == (
        LAYOUTS[layout].weights - 1
    )


@pytest.mark.parametrize("layout", KERNEL_LAYOUTS)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_round_trip_for_every_width_up_to_23(layout: str, n: int) -> None:
    for k in [*range(24), 341, 1023]:
        t = torch.randint(-1, 2, (n, k), dtype=torch.int8)
        packed = pack_ternary(t, layout)
        assert packed.shape == (n, -(-k // LAYOUTS[layout].weights))
        assert torch.equal(unpack_ternary(packed, k, layout), t)


@pytest.mark.parametrize("layout", KERNEL_LAYOUTS)
def test_rows_do_not_straddle_bytes(layout: str) -> None:
    t = torch.randint(-1, 2, (4, 7), dtype=torch.int8)
    alone = torch.cat([pack_ternary(one[None], layout) for one in t])
    assert torch.equal(pack_ternary(t, layout), alone)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_signed_integer_dtype_and_stride_packs_alike(dtype: torch.dtype) -> None:
    t = torch.randint(-1, 2, (6, 9)).to(dtype).t()
    assert torch.equal(pack_ternary(t, "2bit"), pack_ternary(t.to(torch.int8).contiguous(), "2bit"))


def test_uint8_codes_are_not_taken_for_negative_numbers() -> None:
    assert torch.equal(pack_ternary(row(0, 1, dtype=torch.uint8), "2bit"), pack_ternary(row(0, 1), "2bit"))
    with pytest.raises(ValueError, match=r"t\[0, 1\] = 255"):
        pack_ternary(row(0, 255, dtype=torch.uint8), "2bit")


@pytest.mark.parametrize("value", [2, -2, 127, -128])
def test_a_value_that_is_no_code_is_named_with_its_index(value: int) -> None:
    t = torch.zeros(3, 5, dtype=torch.int8)
    t[1, 2] = value
    with pytest.raises(ValueError, match=rf"t\[1, 2\] = {value} is not a ternary code"):
        pack_ternary(t, "base3")


def test_values_beyond_the_packing_dtype_do_not_wrap() -> None:
    with pytest.raises(ValueError, match=r"t\[0, 0\] = 4294967296"):
        pack_ternary(torch.tensor([[2**32]]), "2bit")


@pytest.mark.parametrize(
    "t", [torch.zeros(4), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool), torch.zeros(4, dtype=torch.int8)]
)
def test_what_is_not_an_integer_matrix_is_refused(t: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="t must be an integer matrix"):
        pack_ternary(t, "2bit")


@pytest.mark.parametrize("byte", range(243, 256))
def test_base3_bytes_from_243_on_are_refused(byte: int) -> None:
    with pytest.raises(ValueError, match=rf"packed\[1, 0\] = {byte} holds no ternary codes"):
        unpack_ternary(torch.tensor([[242], [byte]], dtype=torch.uint8), 5, "base3")


def test_2bit_refuses_exactly_the_bytes_with_a_code_3() -> None:
    for byte in range(256):
        packed = torch.tensor([[byte]], dtype=torch.uint8)
        if 3 in [byte >> shift & 3 for shift in (0, 2, 4, 6)]:
            with pytest.raises(ValueError, match=rf"packed\[0, 0\] = {byte} "):
                check_packed(packed, 4, "2bit")
        else:
            assert torch.equal(pack_ternary(unpack_ternary(packed, 4, "2bit"), "2bit"), packed)


def test_every_valid_base3_byte_survives() -> None:
    packed = torch.arange(243, dtype=torch.uint8)[:, None]
    assert torch.equal(pack_ternary(unpack_ternary(packed, 5, "base3"), "base3"), packed)


@pytest.mark.parametrize(
    "packed",
    [torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int8), torch.zeros(2, dtype=torch.uint8)],
    ids=["length", "dtype", "dimensions"],
)
def test_wrong_length_dtype_or_dimensions_name_what_was_expected(packed: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"packed must be uint8 \[N, 2\] for in_features=7 in layout 2bit"):
        unpack_ternary(packed, 7, "2bit")


@pytest.mark.parametrize("call", [lambda: pack_ternary(row(0), "int4"), lambda: unpack_ternary(row(0), 1, "int4")])
def test_an_unknown_layout_names_the_allowed_ones(call: object) -> None:
    with pytest.raises(ValueError, match="layout='int4' is not known; choose one of 2bit, base3"):
        call()
