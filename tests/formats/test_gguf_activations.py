"""llama.cpp's activation blocks in PyTorch, against ggml's own code and against a real llama.cpp."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf_samples import SMALL, needs_llama_cpp
from torch import Tensor, nn

import qat
from qat import QuantConfig
from qat.conversion.layers import packed_layers
from qat.formats.gguf import activations as gguf_activations
from qat.formats.gguf import container as gguf_file
from qat.formats.gguf import writing as gguf
from qat.formats.llamacpp import ggml
from qat.formats.packed import folder as packed
from qat.metrics.perplexity import logits_of, windows

IDS = torch.randint(3, 320, (300,), generator=torch.Generator().manual_seed(0))


def inputs(width: int = 512) -> Tensor:
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 8)[:, None]
    x[0, :256] = 0
    x[1, 0], x[2, 0] = -100.0, 100.0
    return x


def model(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    wide = {"vocab_size": 320, "hidden_size": 256, "intermediate_size": 448, "max_position_embeddings": 256}
    config = transformers.LlamaConfig(**{**SMALL, **wide, **changes})
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    qat.convert(made, QuantConfig(scale_dtype="float16"))
    qat.pack(made)
    return made


def written(made: nn.Module, file: Path, **options: str) -> gguf_file.GGUFFile:
    gguf.save(made, file, **options)  # type: ignore[arg-type]
    return gguf_file.read(file)


def test_q8_0_is_that_of_the_gguf_package() -> None:
    from gguf import GGMLQuantizationType, quants

    x = inputs()
    rows = quants.quantize(x.numpy(), GGMLQuantizationType.Q8_0)
    assert np.array_equal(gguf_activations.q8_0(x).numpy(), quants.dequantize(rows, GGMLQuantizationType.Q8_0))


def test_q8_k_maps_the_largest_entry_to_minus_127() -> None:
    x = torch.zeros(1, 512)
    x[0, :4] = torch.tensor([254.0, 2.9, 3.1, -254.0])  # the first of equal magnitude: a step of -2
    x[0, 256:259] = torch.tensor([-127.0, 0.4, 0.6])
    found = gguf_activations.q8_k(x)
    assert found[0, :4].tolist() == [254.0, 2.0, 4.0, -254.0] and found[0, 256:259].tolist() == [-127.0, 0.0, 1.0]
    assert not found[0, 4:256].any() and not found[0, 259:].any()


@needs_llama_cpp
def test_q8_k_is_that_of_ggml() -> None:
    x = inputs()
    blocks, out = np.empty(x.numel() // 256 * 292, np.uint8), np.empty(x.numel(), np.float32)  # d, 256 codes, 16 sums
    lib, values = ggml.library("base"), x.contiguous().numpy()
    lib.quantize_row_q8_K_ref(ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(blocks.ctypes.data), ctypes.c_int64(x.numel()))
    lib.dequantize_row_q8_K(ctypes.c_void_p(blocks.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(x.numel()))
    np.testing.assert_allclose(gguf_activations.q8_k(x).numpy(), out.reshape(x.shape), rtol=2e-7)  # the same codes, d to one ulp


@pytest.mark.parametrize("floats", ["f16", "q8_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_copy_has_the_files_embeddings_and_leaves_the_model_alone(tmp_path: Path, floats: str, tied: bool) -> None:
    made = model(tie_word_embeddings=tied)
    before = logits_of(made, IDS[:64][None])
    file = written(made, tmp_path / "x.gguf", floats=floats)
    copy = gguf_activations.as_llama_cpp(made, file)
    head = file.float32("token_embd.weight" if tied else "output.weight")
    assert np.array_equal(copy.get_output_embeddings().weight.numpy(), head)  # type: ignore[operator]
    assert np.array_equal(copy.get_input_embeddings().weight.numpy(), file.float32("token_embd.weight"))  # type: ignore[operator]
    assert torch.equal(before, logits_of(made, IDS[:64][None]))
    packed.save(made, tmp_path / "packed")
    again = gguf_activations.as_llama_cpp(packed.load(tmp_path / "packed"), file)
    assert torch.equal(logits_of(again, IDS[:64][None]), logits_of(copy, IDS[:64][None]))
    assert all(layer.config.act_bits == 8 for layer in packed_layers(made).values())


def test_each_layer_is_quantized_in_the_blocks_of_its_type(tmp_path: Path) -> None:
    made = model()
    copy = gguf_activations.as_llama_cpp(made, written(made, tmp_path / "x.gguf"))  # 256 is TQ2_0's width, 448 only Q2_0's
    for name, quantize in (("q_proj", gguf_activations.q8_k), ("down_proj", gguf_activations.q8_0)):
        layer = next(layer for key, layer in packed_layers(copy).items() if key.endswith(name))
        x = inputs(layer.in_features)
        weight = layer.codes().float() * layer.weight_scale
        torch.testing.assert_close(layer(x), quantize(x) @ weight.T, rtol=1e-5, atol=1e-3)


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["q2_0", "auto"])
def test_llama_cpp_is_within_the_noise_and_a_scale_that_is_off_is_found(tmp_path: Path, kind: str) -> None:
    made, batches = model(), list(windows(IDS, 64))
    file = tmp_path / "x.gguf"
    gguf.save(made, file, type=kind, floats="f32")
    found = gguf.read_back(file, made, IDS[:64][None], batches)
    assert found["logits_difference"] < found["logits_noise"] < 0.02
    packed_layers(made)["model.layers.1.mlp.down_proj"].weight_scale.mul_(1.2)
    with pytest.raises(ValueError, match="llama.cpp computes another model from the file than was packed: logits by"):
        gguf.read_back(file, made, IDS[:64][None], batches)
