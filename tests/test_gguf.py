"""GGUF: block layouts against scalar references and stock codecs, whole files, what is refused, damaged files, llama.cpp."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qat
from qat import QuantConfig
from qat.export import ggml, gguf_blocks, gguf_file, gguf_i2s, gguf_models, gguf_tensors, gguf_tokenizer, gguf_verify
from qat.export.gguf_blocks import BLOCKS, decode, encode
from qat.export.tensors import packed_layers
from qat.perplexity import windows

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
from gguf import GGMLQuantizationType, GGUFReader, quants  # noqa: E402

from qat.export import gguf  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "models/stories260k").is_dir(), reason=f"{SHARED} is absent")
needs_llama_cpp = pytest.mark.skipif(ggml.version() is None, reason="llama-cpp-python is not installed: make llama-cpp")


def random_rows(name: str, n: int = 3, blocks: int = 2) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    kind = BLOCKS[name]
    t = random.choice(np.array(kind.codes, np.int8), (n, kind.weights * blocks))
    return t, random.uniform(0.01, 2, (n, blocks)).astype(np.float16)


# block layouts


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


# whole models

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**SMALL, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    "llama3_rope": (
        "LlamaConfig",
        {
            **SMALL,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "linear_rope": ("LlamaConfig", {**SMALL, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    "mistral": ("MistralConfig", {**SMALL, "sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {**SMALL, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 32}),
    "gemma": ("GemmaConfig", {**SMALL, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 7}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, "tie_word_embeddings": True},
    ),
    "gpt_neox_serial": (
        "GPTNeoXConfig",
        {**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, "use_parallel_residual": False},
    ),
}
IDS = torch.randint(3, 64, (256,), generator=torch.Generator().manual_seed(0))
WINDOWS = list(windows(IDS, 64))


def packed_model(
    name: str = "llama",
    changes: dict[str, object] | None = None,
    include: list[str] | None = None,
    exclude: str | None = None,
    **quant: object,
) -> nn.Module:
    """A random model with weights large enough that attention, norms and biases matter."""
    config_class, config = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**config, **(changes or {})})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            elif "embed" in key or "wte" in key or "wpe" in key:
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=0.3 if re.search("q_proj|k_proj", key) else 0.12)
    qat.convert(model, QuantConfig(**quant), include=include, exclude=exclude)  # type: ignore[arg-type]
    qat.pack(model)
    return model


def save(model: nn.Module, file: Path, **options: object) -> dict[str, object]:
    return gguf.save(model, file, **{"floats": "f32", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_in_llama_cpp(tmp_path: Path, name: str) -> None:
    """Without llama.cpp the tensors alone are compared; with it, logits must come out as PyTorch's."""
    model = packed_model(name)
    info = save(model, tmp_path / "x.gguf")
    assert info["verification"]["tensors"] == len(gguf_file.read(tmp_path / "x.gguf").tensors)  # type: ignore[index]
    if ggml.version() is None:
        pytest.skip("llama-cpp-python is not installed: make llama-cpp")
    found = gguf.verify(tmp_path / "x.gguf", model, IDS[:64][None], WINDOWS)
    assert found["logits_difference"] < 0.03, found  # 0.46 with llama's heads in the wrong order


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "no sliding window of 8"),
        ("llama", {"hidden_act": "gelu"}, "computes llama with silu, not with gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic' is not done"),
        ("gemma2", {"tie_word_embeddings": False}, "ties the head"),
        ("gemma2", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar=8"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "layer_types"),
        ("gemma2", {"final_logit_softcapping": None}, "uncapped"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "and by nothing else"),
        ("qwen3", {"attention_bias": True}, "no biases"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, name: str, changes: dict[str, object], message: str
) -> None:
    model = packed_model(name, changes)
    assert message in str(gguf.unsupported(model))
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_architectures_that_are_not_done_are_refused_by_name() -> None:
    config = transformers.OlmoConfig(**SMALL)
    with pytest.raises(ValueError, match="'olmo' is not done for gguf; done are llama, mistral"):
        gguf_models.architecture(config)


def test_sub_norms_have_no_place() -> None:
    names = gguf_models.Names(gguf_models.ARCHITECTURES["llama"], 2)
    assert names["model.layers.1.mlp.down_proj.weight"] == "blk.1.ffn_down.weight"
    with pytest.raises(ValueError, match=r"llama in llama.cpp has no place for model.layers.1.mlp.ffn_sub_norm.weight"):
        names["model.layers.1.mlp.ffn_sub_norm.weight"]


def test_llama_heads_are_interleaved() -> None:
    order = gguf_models.ARCHITECTURES["llama"].row_order("model.layers.0.self_attn.k_proj", 8, transformers.LlamaConfig(**SMALL))
    assert order is not None and order.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]  # 2 heads of 4
    qwen = gguf_models.ARCHITECTURES["qwen2"]
    assert qwen.row_order("model.layers.0.self_attn.k_proj", 8, transformers.Qwen2Config(**SMALL)) is None


# types


def kinds(file: Path) -> dict[str, int]:
    return {name: tensor.kind for name, tensor in gguf_file.read(file).tensors.items()}


def test_auto_chooses_by_shape_and_says_why(tmp_path: Path) -> None:
    info = save(packed_model(changes={"intermediate_size": 256}), tmp_path / "x.gguf")
    found = kinds(tmp_path / "x.gguf")
    assert found["blk.0.ffn_down.weight"] == 35 and found["blk.0.ffn_up.weight"] == 42 and found["token_embd.weight"] == 0
    assert sorted(info["types"]) == [  # type: ignore[call-overload]
        "q2_0 for 12 tensors: only blocks of 64 fit (rows of 64 are no multiple of 256)",
        "tq2_0 for 2 tensors: rows of 256 are whole blocks of 256",
    ]
    assert gguf_file.read(tmp_path / "x.gguf").metadata["general.file_type"] == 41


def test_binary_takes_one_bit_where_rows_allow(tmp_path: Path) -> None:
    model = packed_model(weight="binary")
    save(model, tmp_path / "x.gguf")
    found = kinds(tmp_path / "x.gguf")
    assert found["blk.0.ffn_down.weight"] == 41 and found["blk.0.ffn_up.weight"] == 42


def test_types_asked_for_by_name_that_do_not_fit(tmp_path: Path) -> None:
    for kind, message in (("tq1_0", "rows of 64 are no multiple of 256"), ("q1_0", "rows of 64 are no multiple of 128")):
        with pytest.raises(ValueError, match=f"does not fit {kind}: {message}"):
            save(packed_model(), tmp_path / "x.gguf", type=kind)
    with pytest.raises(ValueError, match="q1_0 holds no zero weights"):
        save(packed_model(changes={"hidden_size": 128}), tmp_path / "x.gguf", type="q1_0")
    with pytest.raises(ValueError, match="type='q4_0' is not allowed for gguf; choose one of auto, tq1_0"):
        save(packed_model(), tmp_path / "x.gguf", type="q4_0")
    assert list(tmp_path.iterdir()) == []


def test_hidden_widths_that_fit_no_block(tmp_path: Path) -> None:
    model = packed_model(changes={"hidden_size": 48, "num_attention_heads": 2})
    with pytest.raises(ValueError, match="does not fit any type: .*rows of 48 are no multiple of 64"):
        save(model, tmp_path / "x.gguf")


def test_mlps_are_padded_and_compute_the_same(tmp_path: Path) -> None:
    model = packed_model("qwen2", {"intermediate_size": 90}, granularity="channel")
    info = save(model, tmp_path / "x.gguf")
    read = gguf_file.read(tmp_path / "x.gguf")
    assert "from 90 to 128" in str(info["padding"]) and read.metadata["qwen2.feed_forward_length"] == 128
    layer = model.get_submodule("model.layers.0.mlp")
    up, down = read.float32("blk.0.ffn_up.weight"), read.float32("blk.0.ffn_down.weight")
    assert not up[90:].any() and not down[:, 90:].any()
    torch.testing.assert_close(torch.from_numpy(up[:90].copy()), layer.up_proj.dequantize(), rtol=2**-11, atol=0)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_scales_of_every_granularity_are_kept_exactly(tmp_path: Path, granularity: str) -> None:
    group = {"group_size": 64} if granularity == "group" else {}
    model = packed_model("qwen2", granularity=granularity, scale_dtype="float16", **group)
    info = save(model, tmp_path / "x.gguf")
    assert info["scale_rounding"] == 0
    found = gguf_file.read(tmp_path / "x.gguf").float32("blk.1.ffn_down.weight")
    assert torch.equal(torch.tensor(found), model.get_submodule("model.layers.1.mlp.down_proj").dequantize())


def test_float32_scales_are_rounded_and_it_is_said(tmp_path: Path) -> None:
    info = save(packed_model(), tmp_path / "x.gguf")
    assert 0 < info["scale_rounding"] <= 2**-11  # type: ignore[operator]
    assert any("scales were rounded to float16" in line for line in gguf_verify.report(info))


def test_scales_outside_float16_are_refused(tmp_path: Path) -> None:
    for value in (1e-7, 1e5):
        model = packed_model()
        model.get_submodule("model.layers.0.mlp.up_proj").weight_scale.fill_(value)
        with pytest.raises(ValueError, match=r"blk.0.ffn_up.weight has the scale 1e[-+]0\d, which float16 cannot hold"):
            save(model, tmp_path / "x.gguf")


def test_groups_smaller_than_a_block_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="groups of 32 with a scale each are no multiple of 64"):
        save(packed_model(granularity="group", group_size=32), tmp_path / "x.gguf")


@pytest.mark.parametrize(("kind", "order"), [("i2_s", "x86"), ("i2_s_arm", "arm")])
def test_i2_s_files(tmp_path: Path, kind: str, order: str) -> None:
    model = packed_model("qwen2", {"hidden_size": 128, "head_dim": 32})
    info = save(model, tmp_path / "x.gguf", type=kind)
    read = gguf_file.read(tmp_path / "x.gguf")
    tensor, layer = read.tensors["blk.0.ffn_up.weight"], model.get_submodule("model.layers.0.mlp.up_proj")
    assert tensor.kind == 36 and len(tensor.data) == 128 * 128 // 4 + 32 and read.metadata["general.file_type"] == 40
    assert tensor.data[:-32].tobytes() == gguf_i2s.encode(layer.codes().numpy(), 0.0, order)[:-32].tobytes()
    assert torch.equal(torch.tensor(read.float32("blk.0.ffn_up.weight", order)), layer.dequantize())
    assert "bitnet.cpp" in str(gguf.verify(tmp_path / "x.gguf", model, IDS[None], WINDOWS)["why"])
    assert info["scale_rounding"] == 0
    with pytest.raises(ValueError, match="128 scales, and the type one a tensor"):
        save(packed_model("qwen2", {"hidden_size": 128}, granularity="channel"), tmp_path / "y.gguf", type=kind)


@pytest.mark.parametrize("floats", gguf_tensors.FLOATS)
def test_types_of_embeddings(tmp_path: Path, floats: str) -> None:
    model = packed_model(changes={"hidden_size": 256}, exclude="*down_proj")
    if floats == "q6_k" and ggml.version() is None:
        with pytest.raises(ValueError, match="llama-cpp-python is not installed"):
            save(model, tmp_path / "x.gguf", floats=floats)
        return
    if floats == "q6_k":
        with pytest.raises(ValueError, match="blk.0.ffn_down.weight has rows of 128, no multiple of the 256 of q6_k"):
            save(model, tmp_path / "x.gguf", floats=floats)
        model = packed_model(changes={"hidden_size": 256})
    save(model, tmp_path / "x.gguf", floats=floats)
    read = gguf_file.read(tmp_path / "x.gguf")
    number = gguf_tensors.FLOATS[floats]
    assert read.tensors["token_embd.weight"].kind == number and read.tensors["output_norm.weight"].kind == 0
    assert floats == "q6_k" or read.tensors["blk.0.ffn_down.weight"].kind == number
    exact = model.get_input_embeddings().weight.detach()
    limits = {"f32": 0, "f16": 1e-3, "bf16": 1e-2, "q8_0": 2e-2, "q6_k": 6e-2}
    assert (torch.tensor(read.float32("token_embd.weight")) - exact).abs().max() <= limits[floats] * exact.abs().max()


def test_embeddings_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = packed_model()
    model.get_input_embeddings().weight.data[3, 4] = 1e5
    with pytest.raises(ValueError, match="token_embd.weight has values beyond float16's range"):
        save(model, tmp_path / "x.gguf", floats="f16")


# files in the way, and planted faults


def test_a_foreign_file_is_not_overwritten_and_ours_is(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF of somebody else")
    with pytest.raises(ValueError, match="was not written by an export of qat"):
        save(packed_model(), file)
    file.unlink()
    save(packed_model(), file)
    save(packed_model(weight="binary"), file)
    assert json.loads(gguf_file.read(file).metadata["qat.quant"])["weight"] == "binary"
    with pytest.raises(ValueError, match="does not end in .gguf"):
        save(packed_model(), tmp_path / "x")


def test_a_failed_check_leaves_no_file(tmp_path: Path) -> None:
    def fail(file: Path) -> dict[str, object]:
        assert file.exists()
        raise ValueError("differs")

    with pytest.raises(ValueError, match="differs"):
        save(packed_model(), tmp_path / "x.gguf", check=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, *rest: object) -> None:
        file.write_bytes(b"GGUF")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_file, "write", full)
    with pytest.raises(ValueError, match="cannot write .*x.gguf: .*No space left"):
        save(packed_model(), tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_quantized_head_is_written_as_such(tmp_path: Path, name: str) -> None:
    model = packed_model(name, {"tie_word_embeddings": False}, include=["*layers*", "lm_head"])
    info = save(model, tmp_path / "x.gguf")
    assert "lm_head" in packed_layers(model) and kinds(tmp_path / "x.gguf")["output.weight"] == 42
    if ggml.version():
        assert gguf.verify(tmp_path / "x.gguf", model, IDS[:64][None], WINDOWS)["logits_difference"] < 0.03, info


def test_one_wrong_bit_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = gguf_file.write

    def faulty(file: Path, *rest: object) -> None:
        write(file, *rest)  # type: ignore[arg-type]
        tensor = gguf_file.read(file).tensors["blk.1.attn_v.weight"]
        data = bytearray(file.read_bytes())
        at = data.index(tensor.data.tobytes()) + 2
        data[at] ^= 1 if data[at] & 3 != 2 else 2
        file.write_bytes(bytes(data))

    monkeypatch.setattr(gguf_file, "write", faulty)
    with pytest.raises(
        ValueError, match="tensor 'blk.1.attn_v.weight' holds code 3|tensor blk.1.attn_v.weight was not read back"
    ):
        save(packed_model(), tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


@needs_llama_cpp
def test_a_model_with_other_rows_is_found_by_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model()
    wrong = gguf_models.Architecture("llama", ("silu",))  # without interleaving
    monkeypatch.setitem(gguf_models.ARCHITECTURES, "llama", wrong)
    with pytest.raises(ValueError, match="another model from the file than was packed: logits by 4"):
        save(model, tmp_path / "x.gguf", check=lambda file: gguf.verify(file, model, IDS[:64][None], WINDOWS))


def test_unpacked_models_are_refused(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match="no quantized layers"):
        save(model, tmp_path / "x.gguf")
    qat.convert(model)
    with pytest.raises(ValueError, match="q_proj is not packed yet; call qat.pack first"):
        save(model, tmp_path / "x.gguf")


# reading


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every kind of value and tensor."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tensors = {}
    for name in BLOCKS:
        t, d = random_rows(name, n=1, blocks=1)
        tensors[name] = gguf_file.Tensor(t.shape, BLOCKS[name].number, encode(t, d, name).reshape(-1))
    tensors["norm"] = gguf_file.Tensor((4,), 0, np.arange(4, dtype=np.float32).view(np.uint8))
    metadata = {"a.list": ["x", "yy"], "a.numbers": [1, 2], "a.float": 0.5, "a.flag": True, "a.int": 7}
    gguf_file.write(file, "llama", metadata, tensors)
    return file.read_bytes()


def load(data: bytes) -> gguf_file.GGUFFile:
    read = gguf_file.parse(np.frombuffer(data, np.uint8))
    for name in read.tensors:
        read.float32(name)
    return read


def test_round_trip_of_a_file(tiny: bytes) -> None:
    read = load(tiny)
    assert read.metadata == {
        "general.architecture": "llama",
        "a.list": ["x", "yy"],
        "a.numbers": [1, 2],
        "a.float": 0.5,
        "a.flag": True,
        "a.int": 7,
    }
    assert list(read.tensors) == [*BLOCKS, "norm"] and read.float32("norm").tolist() == [0, 1, 2, 3]


def test_truncated_files_are_refused(tiny: bytes) -> None:
    whole = len(tiny)
    last = whole - (-16 % 32)  # the padding behind the last tensor may be missing
    for size in range(0, last):
        with pytest.raises(ValueError):
            load(tiny[:size])
    with pytest.raises(ValueError, match="follow the last tensor"):
        load(tiny + bytes(64))


def test_mutated_files_give_a_clear_error_or_a_whole_load(tiny: bytes) -> None:
    random, errors, loads = np.random.default_rng(0), 0, 0
    for _ in range(4000):
        data = bytearray(tiny)
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(len(data)))
            choice = random.integers(3)
            if choice == 0:
                data[at] = int(random.integers(256))
            elif choice == 1:
                data[at : at + 8] = random.choice([bytes(8), b"\xff" * 8, struct.pack("<q", 2**62), struct.pack("<q", 31)])
            else:
                del data[at : at + int(random.integers(1, 40))]
        try:
            read = load(bytes(data))
        except ValueError as error:
            assert str(error)
            errors += 1
        else:
            assert all(np.isfinite(read.float32(name)).all() for name in read.tensors)
            loads += 1
    assert errors > 1000 and loads > 100, (errors, loads)


def with_kind(data: bytes, name: str, kind: int) -> bytes:
    at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    dimensions = struct.unpack_from("<I", data, at)[0]
    at += 4 + 8 * dimensions
    return data[:at] + struct.pack("<I", kind) + data[at + 4 :]


@pytest.mark.parametrize(("name", "kind"), [("tq1_0", 35), ("tq2_0", 34), ("q1_0", 42), ("q2_0", 41), ("norm", 1), ("norm", 99)])
def test_mislabelled_tensors_are_refused(tiny: bytes, name: str, kind: int) -> None:
    with pytest.raises(ValueError, match=f"tensor '{name}'|lies at|no multiple"):
        load(with_kind(tiny, name, kind))


def test_q2_0_of_128_is_told_by_its_size(tmp_path: Path) -> None:
    """An old file: same number, a block of 34 bytes for 128 weights; as the last tensor and before another."""
    old = np.zeros(8 * 34 * 2, np.uint8)
    for tensors in (
        {"w": gguf_file.Tensor((8, 256), 42, old)},
        {"w": gguf_file.Tensor((8, 256), 42, old), "z": gguf_file.Tensor((8,), 0, np.zeros(32, np.uint8))},
    ):
        gguf_file.write(tmp_path / "old.gguf", "llama", {}, tensors)
        with pytest.raises(ValueError, match="tensor 'w' is Q2_0 with 128 weights a block"):
            gguf_file.read(tmp_path / "old.gguf")


def test_code_3_names_the_tensor(tmp_path: Path) -> None:
    data = np.concatenate([np.array([1.0], np.float16).view(np.uint8), np.full(16, 0b11, np.uint8)])
    gguf_file.write(tmp_path / "x.gguf", "llama", {}, {"w": gguf_file.Tensor((1, 64), 42, data)})
    with pytest.raises(ValueError, match="tensor 'w' holds code 3"):
        gguf_file.read(tmp_path / "x.gguf").float32("w")


def test_the_stock_reader_agrees_on_types_that_it_knows(tmp_path: Path) -> None:
    info = save(packed_model(changes={"hidden_size": 256, "intermediate_size": 256}), tmp_path / "x.gguf", type="tq1_0")
    assert info["verification"]["stock_reader"] is True  # type: ignore[index]
    reader = GGUFReader(tmp_path / "x.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"TQ1_0", "F32"}


@pytest.mark.parametrize(
    ("kind", "weight"), [("tq1_0", "ternary"), ("tq2_0", "ternary"), ("q2_0", "ternary"), ("q1_0", "binary")]
)
def test_stock_transformers_gets_the_weights_back(tmp_path: Path, kind: str, weight: str) -> None:
    """Heads in transformers' order again, tokenizer included; Q2_0 and Q1_0 by way of a plain copy."""
    from qat.config import ModelConfig
    from qat.models import describe_source, load_model, load_tokenizer

    wide = {"hidden_size": 256, "intermediate_size": 256, "attention_bias": False, "mlp_bias": False}
    model = packed_model(changes={**wide, "vocab_size": 261, "eos_token_id": 260}, weight=weight, scale_dtype="float16")
    tokenizer, config = byte_level(), ModelConfig(path=str(tmp_path / "x.gguf"))
    save(model, tmp_path / "x.gguf", tokenizer=tokenizer, type=kind, card={"license": "mit"})
    again = load_model(config)
    for name, layer in packed_layers(model).items():
        assert torch.equal(again.get_submodule(name).weight, layer.dequantize()), name
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert load_tokenizer(config)("the 12 cats").input_ids == tokenizer("the 12 cats").input_ids
    bits = 1 if "1" in kind else 2
    assert describe_source(config) == {
        "base_model": "x.gguf",
        "license": "mit",
        "note": f"{bits}-bit GGUF ({kind.upper()}) dequantized",
    }


def test_i2_s_is_not_loaded(tmp_path: Path) -> None:
    from qat.config import ModelConfig
    from qat.export.contents import read
    from qat.models import describe_source, load_model

    config = ModelConfig(path=str(tmp_path / "x.gguf"))
    save(packed_model("qwen2", {"hidden_size": 128}), tmp_path / "x.gguf", type="i2_s")
    with pytest.raises(ValueError, match="is I2_S of bitnet.cpp, which does not say for which machine"):
        load_model(config)
    assert read(tmp_path / "x.gguf").others["I2_S"][0] == 14 and describe_source(config)["note"] == "I2_S GGUF"


def test_loading_a_model_from_a_damaged_gguf_is_one_clear_error(tmp_path: Path, tiny: bytes) -> None:
    from qat.config import ModelConfig
    from qat.models import load_model

    (tmp_path / "x.gguf").write_bytes(tiny[:-40])
    with pytest.raises(ValueError, match="x.gguf is not a whole GGUF file"):
        load_model(ModelConfig(path=str(tmp_path / "x.gguf")))


# tokenizers


def byte_level(pre_tokenizer: object = None, **special: str) -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")]
    words = [*alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **(special or {"eos_token": "<|end|>"}))


def test_byte_level_vocabulary() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages }}"
    found = gguf_tokenizer.vocabulary(tokenizer, 264)
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.merges"] == ["t h", "th e", "Ġ the", "1 2"]
    assert found["tokenizer.ggml.tokens"][256:] == ["th", "the", "Ġthe", "12", "<|end|>", "[PAD261]", "[PAD262]", "[PAD263]"]
    assert found["tokenizer.ggml.token_type"][255:] == [1, 1, 1, 1, 1, 3, 5, 5, 5]
    assert found["tokenizer.ggml.eos_token_id"] == found["tokenizer.ggml.bos_token_id"] == 260
    assert found["tokenizer.ggml.add_bos_token"] is False and found["tokenizer.chat_template"] == "{{ messages }}"
    with pytest.raises(ValueError, match="has the id 260, but the embedding only 200 rows"):
        gguf_tokenizer.vocabulary(tokenizer, 200)


def test_text_splits_are_recognized_or_refused() -> None:
    from tokenizers import Regex, pre_tokenizers

    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert gguf_tokenizer.vocabulary(byte_level(digits), 261)["tokenizer.ggml.pre"] == "smollm"
    for pattern, name in gguf_tokenizer._SPLITS.items():
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), levels])
        assert gguf_tokenizer.vocabulary(byte_level(split), 261)["tokenizer.ggml.pre"] == name
    odd = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("a+"), "isolated"), levels])
    with pytest.raises(ValueError, match="is not recognized; name llama.cpp's own by --pre-tokenizer"):
        gguf_tokenizer.vocabulary(byte_level(odd), 261)
    assert gguf_tokenizer.vocabulary(byte_level(odd), 261, "falcon")["tokenizer.ggml.pre"] == "falcon"


def test_other_tokenizers_are_refused(tiny_model: Path) -> None:
    words = transformers.AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match="a WordLevel tokenizer is not done for gguf"):
        gguf_tokenizer.vocabulary(words, 64)
    with pytest.raises(ValueError, match="no eos, pad or unk token"):
        gguf_tokenizer.vocabulary(byte_level(None, additional_special_tokens=["<x>"]), 261)


@needs_llama_cpp
def test_llama_cpp_splits_texts_alike_and_a_wrong_split_is_found(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model, tokenizer = packed_model(changes={"vocab_size": 261, "eos_token_id": 260}), byte_level(digits)
    info = save(model, tmp_path / "x.gguf", tokenizer=tokenizer)
    assert info["verification"]["texts"] == len(gguf_verify.TEXTS)  # type: ignore[index]
    with pytest.raises(ValueError, match="llama.cpp would read 'In 2024, 12345 people"):
        save(model, tmp_path / "x.gguf", tokenizer=tokenizer, pre_tokenizer="gpt-2")


# real models in llama.cpp


@needs_shared
@needs_llama_cpp
@pytest.mark.parametrize(("weight", "scale"), [("ternary", "float32"), ("binary", "float16")])
def test_stories260k(tmp_path: Path, weight: str, scale: str) -> None:
    from qat.config import DataConfig
    from qat.data import text_tokens

    source = SHARED / "models/stories260k"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    qat.convert(model, QuantConfig(weight=weight, scale_dtype=scale))
    qat.pack(model)
    batches = list(windows(text_tokens(str(SHARED / "data/tinystories/valid.txt"), tokenizer, DataConfig(), 4096), 512))
    info = gguf.save(
        model, tmp_path / "x.gguf", tokenizer, check=lambda file: gguf.verify(file, model, batches[0][0][:2, :256], batches)
    )
    found = info["verification"]
    assert found["texts"] == len(gguf_verify.TEXTS) and found["perplexity_difference"] < 0.02
    assert re.search("from 172 to 192", info["padding"])


@needs_llama_cpp
def test_glassllm_with_its_own_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("glassllm")
    from qat.config import ModelConfig
    from qat.models import load_model, load_tokenizer

    config = ModelConfig(path="package://glassllm/weights/en.npz")
    model, tokenizer = load_model(config), load_tokenizer(config)
    qat.convert(model)
    qat.pack(model)
    ids = torch.tensor(tokenizer("Alice was beginning to get very tired of sitting by her sister on the bank. " * 12).input_ids)
    batches = list(windows(ids, 128))
    info = gguf.save(model, tmp_path / "x.gguf", tokenizer, check=lambda file: gguf.verify(file, model, batches[0][0], batches))
    assert info["verification"]["texts"] >= 1 and info["verification"]["perplexity_difference"] < 0.02
