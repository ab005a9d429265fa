"""The layout of one zero in four: bytes by hand, round trips, what is refused, and a trained model that is stored in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_checks import same
from tiny import SIZES
from transformers import LlamaConfig, LlamaForCausalLM

import qat
from qat import QuantConfig
from qat.config import ExportConfig, ModelConfig, TrainConfig
from qat.formats.packed import folder
from qat.inference.tiles import TiledLinear
from qat.nn.bitlinear import BitLinear
from qat.nn.packed import PackedBitLinear
from qat.quantizers.layouts import LAYOUTS
from qat.quantizers.packing import decode, encode, pack_ternary, two_bit, unpack_ternary
from qat.quantizers.record import Quantizer


def sparse(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """int8 [n, k] with one zero in each four."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2, (n, k // 4, 4), generator=generator) * 2 - 1
    zero = torch.randint(0, 4, (n, k // 4, 1), generator=generator)
    return codes.scatter(-1, zero, 0).flatten(1).to(torch.int8)


def test_bytes_are_those_worked_out_by_hand() -> None:
    """Zero at 0 with signs + - +: 0 + 0b101 = 5; at 3 with - - -: 24; at 2 with + + -: 16 + 0b011 = 19."""
    codes = torch.tensor([[0, 1, -1, 1, -1, -1, -1, 0, 1, 1, 0, -1]], dtype=torch.int8)
    number = 5 | 24 << 5 | 19 << 10
    assert pack_ternary(codes, "sparse").tolist() == [[number & 255, number >> 8]]


def test_the_32_blocks_are_the_32_numbers() -> None:
    numbers = torch.tensor([[n for n in range(32)]])
    bits = numbers[0, :, None] >> torch.arange(5) & 1
    packed = (bits.reshape(-1, 8) << torch.arange(8)).sum(-1).to(torch.uint8)[None]
    blocks = unpack_ternary(packed, 128, "sparse").view(32, 4)
    assert len({tuple(block) for block in blocks.tolist()}) == 32 and ((blocks == 0).sum(-1) == 1).all()
    assert torch.equal(pack_ternary(blocks.view(1, 128), "sparse"), packed)


@pytest.mark.parametrize("k", [0, 4, 8, 12, 28, 32, 36, 340])
def test_round_trips_and_room(k: int) -> None:
    codes = sparse(3, k)
    packed = pack_ternary(codes, "sparse")
    assert packed.shape == (3, LAYOUTS["sparse"].row_bytes(k)) == (3, (k // 4 * 5 + 7) // 8)
    assert torch.equal(unpack_ternary(packed, k, "sparse"), codes)
    assert torch.equal(two_bit(packed, k, "sparse"), encode(codes))


def test_codes_without_one_zero_in_four_are_named() -> None:
    for column, value in ((5, 0), (4, 1)):
        codes = sparse(2, 8)
        codes[1, 4:] = torch.tensor([0, 1, 1, -1])
        codes[1, column] = value
        with pytest.raises(ValueError, match=r"t\[1, 4:\] does not fit layout sparse, of one zero in each four codes"):
            pack_ternary(codes, "sparse")
    with pytest.raises(ValueError, match=r"t\[0, 0:\] does not fit layout sparse"):
        pack_ternary(torch.zeros(1, 6, dtype=torch.int8), "sparse")


def test_bits_in_the_padding_are_refused() -> None:
    packed = pack_ternary(sparse(2, 4), "sparse")
    packed[1, 0] |= 1 << 5
    with pytest.raises(ValueError, match=r"packed\[1, 0\] = \d+ holds no ternary codes in layout sparse"):
        unpack_ternary(packed, 4, "sparse")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_layer_runs_as_in_2bit(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = BitLinear(44, 24, config=QuantConfig(weight="sherry", granularity="channel")).eval()
    layers = [PackedBitLinear.from_bitlinear(layer, name) for name in ("2bit", "sparse")]
    x = torch.randn(tokens, 44).to(dtype)
    with torch.inference_mode():
        first, second = (packed(x) for packed in layers)
        same(second, first)
        same(TiledLinear([layers[1]])(x), TiledLinear([layers[0]])(x))
    grad = x.float().requires_grad_()
    layers[1](grad).sum().backward()
    assert grad.grad is not None and torch.equal(layers[1].codes(), decode(layers[0].packed, 44, "2bit"))


def test_a_model_is_stored_and_read_back_and_is_smaller(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    qat.convert(model, QuantConfig(weight="sherry", granularity="channel"))
    ids = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    trained = model(input_ids=ids).logits
    qat.pack(model, layout="sparse")
    folder.save(model, tmp_path, floats="float32")
    back = folder.load(tmp_path)
    same(back(input_ids=ids).logits, trained)
    layers = [layer for layer in back.modules() if isinstance(layer, PackedBitLinear)]
    assert layers and all(layer.packed.shape[1] == -(-5 * layer.in_features // 32) for layer in layers)


def test_ternary_codes_of_which_a_quantizer_says_nothing_fit_no_layout() -> None:
    row = Quantizer(levels=(-1, 0, 1), codes="none:none")
    assert row.unfit("ternary") == "its codes are -1, 0, 1, and ternary ones are -1, 0, 1"
    assert row.unfit("sparse") == "of sparse codes exactly one in four neighbours is 0"


def test_other_quantizers_are_refused_before_training() -> None:
    export = ExportConfig(layout="sparse")
    for weight in ("ternary", "binary", "twn"):
        config = TrainConfig(model=ModelConfig(path="none"), quant=QuantConfig(weight=weight), export=export)
        message = f"quant.weight={weight} does not fit export.layout=sparse: of sparse codes exactly one in four neighbours is 0"
        with pytest.raises(ValueError, match=message):
            config.check()
    mixed = QuantConfig(weight="sherry", overrides={"*.down_proj": {"weight": "ternary"}})
    with pytest.raises(
        ValueError, match=r"^quant.overrides, \*.down_proj: quant.weight=ternary does not fit export.layout=sparse"
    ):
        TrainConfig(model=ModelConfig(path="none"), quant=mixed, export=export).check()
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    qat.convert(model, QuantConfig())
    with pytest.raises(ValueError, match="quant.weight=ternary does not fit layout sparse"):
        qat.pack(model, layout="sparse")
