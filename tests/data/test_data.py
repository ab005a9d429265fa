"""Sources, token cache, order of batches, exact resume in lightning, chats, self-generated text."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qat.config import DataConfig, SelfgenConfig
from qat.data import build_datamodule, text_tokens, tokens
from qat.data.order import StreamBatches, generator, permutation
from qat.data.selfgen import draw
from qat.data.sources import Source, read_documents
from qat.inference.kvcache import buffered_cache

CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '$' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; id = place in the list below, `$` ends a sequence."""
    vocabulary = {character: i for i, character in enumerate("?$<>\n abcdefghijklmnopqrstuvwxyz0123456789")}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="$")


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    text = tmp_path / "train.txt"
    text.write_text("".join(f"line {i} abc\n" for i in range(60)))
    return DataConfig(train=str(text), sequence_length=16, batch_size=2, valid_fraction=0.2, cache_dir=str(tmp_path / "cache"))


def tiny_llama(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=32, **sizes)).eval()


# sources


def texts(path: Path, **arguments: str) -> list[tuple[str, bool]]:
    return list(read_documents(Source(str(path), **arguments)))


def test_a_text_file_is_one_document_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.data.sources.PIECE", 10)
    file = tmp_path / "a.txt"
    file.write_text("one two\nthree four five\nsix\n" * 3, newline="")
    pieces = texts(file)
    assert "".join(text for text, _ in pieces) == file.read_text()
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 3


def test_jsonl_and_parquet_give_the_same_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    words = ["first", "second\nline", "third ü"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": 1, "body": w}) for w in words) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "body": words}), tmp_path / "a.parquet", row_group_size=2)
    expected = [(word, True) for word in words]
    assert texts(tmp_path / "a.jsonl", field="body") == texts(tmp_path / "a.parquet", field="body") == expected


def test_the_text_that_ships_with_python() -> None:
    [(text, ends)] = texts(Path("pydoc_data.topics"))
    assert ends and len(text) > 300_000 and 'The "assert" statement' in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n \n", "has no text"),
        ("a.txt", b"caf\xe9", "as UTF-8 text"),
        ("a.csv", b"x", "allowed are .txt, .jsonl, .parquet"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": oops}\n', r"a.jsonl:2: not a line of JSON"),
        ("a.jsonl", b'{"body": "x", "id": 3}\n', r"a.jsonl:1: there is no field 'text'; its fields are 'body', 'id'"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1: the field 'text' holds int"),
        ("a.jsonl", b"[1]\n", "must be an object"),
        ("a.jsonl", b"", "has no text"),
        ("a.parquet", b"PAR1 not really", "as parquet"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / name)


def test_an_unreachable_hub_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.models.hub.hub_found", lambda: False)
    with pytest.raises(ValueError, match="no file 'org/name', and the Hugging Face hub cannot be reached"):
        texts(Path("org/name"))


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        texts(Path("nowhere.txt"))
    with pytest.raises(ValueError, match="is a folder"):
        texts(tmp_path)


# the token cache


def test_documents_are_separated_and_cached(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "ab"}\n{"text": ""}\n{"text": "c"}\n')
    array = tokens.tokenize(Source(str(file)), tokenizer, tmp_path / "cache")
    assert array.dtype == np.uint16 and tokenizer.convert_ids_to_tokens(array.tolist()) == ["a", "b", "$", "c"]
    assert tokens.tokenize(Source(str(file)), tokenizer, tmp_path / "cache", max_tokens=4).tolist() == array[:4].tolist()
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 2  # the limit belongs to the key
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_cached_text_is_not_tokenized_again(data: DataConfig, tokenizer: PreTrainedTokenizerFast, monkeypatch) -> None:
    first = text_tokens(str(data.train), tokenizer, data, None)
    monkeypatch.setattr(tokens, "_encode", None)
    assert torch.equal(text_tokens(str(data.train), tokenizer, data, None), first)
    Path(str(data.train)).write_text("other text")
    with pytest.raises(TypeError):  # another content: tokenized again, which the patch forbids
        text_tokens(str(data.train), tokenizer, data, None)


@pytest.mark.parametrize("damage", ["truncate", "flip", "sidecar"])
def test_a_damaged_cache_is_made_anew(data: DataConfig, tokenizer: PreTrainedTokenizerFast, damage: str) -> None:
    first = text_tokens(str(data.train), tokenizer, data, None)
    [file] = Path(str(data.cache_dir)).glob("*.bin")
    raw = file.read_bytes()
    if damage == "sidecar":
        file.with_suffix(".json").write_text("{")
    else:
        file.write_bytes(raw[:-2] if damage == "truncate" else bytes([raw[0] ^ 1]) + raw[1:])
    assert torch.equal(text_tokens(str(data.train), tokenizer, data, None), first)
    assert file.read_bytes() == raw


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def blocks():
        yield [1, 2, 3]
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="No space left on device; free space there or set data.cache_dir"):
        tokens.write(tmp_path, "name", blocks(), vocabulary=10)
    assert not list(tmp_path.iterdir())


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    assert tokens.write(tmp_path, "name", [[65_536, 7]], vocabulary=65_537).tolist() == [65_536, 7]


# packing, split and order


def test_split_windows_and_labels(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    module = build_datamodule(data, tokenizer, total_batches=3)
    everything = text_tokens(str(data.train), tokenizer, data, None)
    cut = len(everything) - int(0.2 * len(everything))
    assert torch.equal(module.eval_tokens, everything[cut:]) and module.eval_tokens.dtype == torch.int64
    assert (module.name, module.eval_name) == ("train.txt", "last 20 % of train.txt")
    assert module.train_tokens == cut // 16 * 16
    assert torch.equal(module.train[1]["input_ids"], everything[16:32])
    [*_, last] = batches = list(module.val_dataloader())
    assert last["input_ids"].dtype == last["labels"].dtype == torch.int64 and batches[0]["labels"].shape == (2, 16)
    assert torch.equal(batches[0]["labels"], batches[0]["input_ids"])


def test_text_shorter_than_a_sequence_is_refused(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    data.sequence_length = 500
    with pytest.raises(ValueError, match=r"last 20 % of train.txt has \d+ tokens, fewer than one sequence .*=500"):
        build_datamodule(data, tokenizer, total_batches=1)


def test_every_epoch_is_its_own_permutation_and_nothing_is_dropped() -> None:
    stream = [index for batch in StreamBatches(7, 3, seed=1, total_batches=7) for index in batch]  # 21 = three epochs of 7
    epochs = [stream[:7], stream[7:14], stream[14:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1] != epochs[2] and epochs[1] == permutation(7, 1, 1).tolist()
    assert stream != [index for batch in StreamBatches(7, 3, seed=2, total_batches=7) for index in batch]


def test_devices_share_a_batch_and_positions_continue() -> None:
    whole = list(StreamBatches(10, 4, seed=3, total_batches=5))
    parts = [list(StreamBatches(10, 2, seed=3, total_batches=5, rank=rank, world=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    rest = StreamBatches(10, 4, seed=3, total_batches=5, start=12)
    assert list(rest) == whole[3:] and len(rest) == 5


# resume in lightning


class Recorder(lightning.LightningModule):
    """Writes down every batch it trains on; raises before batch `die_at`."""

    def __init__(self, die_at: int | None = None) -> None:
        super().__init__()
        self.layer, self.die_at, self.seen = torch.nn.Linear(1, 1), die_at, []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == self.die_at:
            raise RuntimeError("killed")
        self.seen.append((batch_idx, batch["input_ids"].tolist(), torch.rand(1).item()))
        return self.layer(batch["input_ids"].float().mean().view(1, 1)).sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def fit(module: Recorder, data: DataConfig, tokenizer: PreTrainedTokenizerFast, folder: Path, resume: Path | None = None):
    trainer = lightning.Trainer(
        max_steps=12, accumulate_grad_batches=3, val_check_interval=12, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
    )  # fmt: skip
    trainer.fit(
        module, datamodule=build_datamodule(data, tokenizer, seed=5, total_batches=36), ckpt_path=resume, weights_only=True
    )
    return trainer


@pytest.mark.parametrize("saved", [5, 8, 11])  # in mid epoch, at a validation, before the end
def test_a_killed_run_resumes_with_the_same_batches(saved, data, tokenizer, tmp_path) -> None:
    torch.manual_seed(0)
    whole = Recorder()
    fit(whole, data, tokenizer, tmp_path / "whole")
    assert [index for index, _, _ in whole.seen] == list(range(36))

    torch.manual_seed(0)
    killed = Recorder(die_at=saved * 3 + 1)  # one batch into the next accumulation
    with pytest.raises(RuntimeError, match="killed"):
        fit(killed, data, tokenizer, tmp_path / "killed")
    rest = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists")
        trainer = fit(rest, data, tokenizer, tmp_path / "killed", resume=tmp_path / "killed" / f"step={saved}.ckpt")
    assert trainer.global_step == 12
    assert [s[:2] for s in rest.seen] == [s[:2] for s in whole.seen[saved * 3 :]]
    end = torch.load(tmp_path / "killed" / "step=12.ckpt", weights_only=True)["QATData"]
    assert end == {"sequences": 12 * 3 * 2, "step": 12}  # counted on from the restored position


def test_loaders_leave_the_global_random_numbers_alone(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    module = build_datamodule(data, tokenizer, total_batches=3)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(iter(module.train_dataloader())), next(iter(module.val_dataloader()))
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_holds_the_position(data, tokenizer, tmp_path) -> None:
    fit(Recorder(), data, tokenizer, tmp_path)
    state = torch.load(tmp_path / "step=7.ckpt", weights_only=True)["QATData"]
    assert state == {"sequences": 7 * 3 * 2, "step": 7}
    module = build_datamodule(data, tokenizer, seed=5, total_batches=36)
    module.load_state_dict(state)
    assert module.state_dict() == state and len(list(module.train_dataloader())) == 36 - 21


# chats


def chat_data(tmp_path: Path, chats: list, **changes) -> DataConfig:
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    arguments = {"kind": "chat", "train": str(tmp_path / "chat.jsonl"), "sequence_length": 48, "valid_fraction": 0.4} | changes
    return DataConfig(**arguments)


def say(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '$' }}{% endgeneration %}{% else %}{{ m.content + '$' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_the_assistant_is_learned(template: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = template
    module = build_datamodule(chat_data(tmp_path, [say("hi", "yo", "q", "a1"), say("x", "z")]), tokenizer, total_batches=1)
    item = module.train[0]
    length = int(item["attention_mask"].sum())
    assert tokenizer.decode(item["input_ids"][:length]).replace(" ", "") == "<user>hi$<assistant>yo$<user>q$<assistant>a1$"
    learned = item["labels"][item["labels"] != -100]
    assert tokenizer.convert_ids_to_tokens(learned.tolist()) == ["y", "o", "$", "a", "1", "$"]
    assert item["input_ids"].shape == item["labels"].shape == (48,) and (item["labels"][length:] == -100).all()
    assert len(module.train) == len(module.valid) == 1 and module.eval_tokens.shape == (len("<user>x$<assistant>z$"),)


def test_long_chats_are_cut_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML
    chats = [say("a", "b" * 60), say("a" * 60, "b"), say("a", "b")]
    module = build_datamodule(chat_data(tmp_path, chats), tokenizer, total_batches=1)
    assert module.notes == [
        "2 training chats cut to 48 tokens",
        "1 training chats dropped: no assistant's word within that length",
    ]


def test_chats_that_cannot_be_masked_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = chat_data(tmp_path, [say("a", "b", "c", "d"), say("a", "b")])
    with pytest.raises(ValueError, match="has none; take an instruction-tuned model"):
        build_datamodule(data, tokenizer, total_batches=1)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content if loop.last else 'x' }}{% endfor %}"
    with pytest.raises(ValueError, match="chat.jsonl:1: the chat template renders message 2 otherwise"):
        build_datamodule(data, tokenizer, total_batches=1)
    with pytest.raises(ValueError, match="chat.jsonl:1: a chat must be a non-empty list"):
        build_datamodule(chat_data(tmp_path, [["hello"]]), tokenizer, total_batches=1)


# self-generated text


def selfgen_data(tmp_path: Path, **changes) -> DataConfig:
    settings = SelfgenConfig(**({"tokens": 90, "valid_tokens": 40, "batch_size": 4} | changes))
    return DataConfig(kind="selfgen", sequence_length=16, batch_size=2, cache_dir=str(tmp_path), selfgen=settings)


def sampled(data: DataConfig, tokenizer: PreTrainedTokenizerFast, seed: int = 0, weights: int = 0):
    teacher = tiny_llama(len(tokenizer), weights)
    return build_datamodule(data, tokenizer, teacher=teacher, seed=seed, total_batches=2, progress=False)


def test_selfgen_depends_on_the_seed_and_the_weights_only(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first = sampled(selfgen_data(tmp_path / "a"), tokenizer)
    again = sampled(selfgen_data(tmp_path / "b"), tokenizer)
    assert np.array_equal(first.train.tokens, again.train.tokens) and torch.equal(first.eval_tokens, again.eval_tokens)
    assert first.train_tokens == 96 and first.eval_tokens.shape == (48,)  # whole sequences
    assert not np.array_equal(first.train.tokens[:48], first.eval_tokens.numpy())
    for other in (
        sampled(selfgen_data(tmp_path / "a"), tokenizer, seed=1),
        sampled(selfgen_data(tmp_path / "a"), tokenizer, weights=1),
    ):
        assert not np.array_equal(first.train.tokens, other.train.tokens)
    newline = tokenizer.convert_tokens_to_ids("\n")
    assert all(window["input_ids"][0] == newline for window in first.train)


def test_selfgen_follows_the_models_distribution(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = selfgen_data(tmp_path, top_k=1, batch_size=3)
    teacher = tiny_llama(len(tokenizer))
    ids = sampled(data, tokenizer).train[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(teacher(ids[None]).logits[0].argmax(-1)[:-1], ids[1:])


def test_draw_is_the_inverse_of_the_distribution() -> None:
    logits = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().expand(20_000, 4)
    shares = torch.bincount(draw(logits, torch.rand(20_000, 1, generator=generator(0))), minlength=4) / 20_000
    assert torch.allclose(shares, torch.tensor([0.5, 0.0, 0.25, 0.25]), atol=0.02) and shares[1] == 0
    assert draw(logits[:1], torch.tensor([[0.999999]])).tolist() == [3]
    assert set(draw(logits, torch.rand(20_000, 1), top_k=1).tolist()) == {0}


def test_the_buffered_cache_gives_the_logits_of_one_pass() -> None:
    model, ids = tiny_llama(40), torch.randint(40, (3, 12), generator=generator(0))
    cache = buffered_cache(model, 12)
    with torch.no_grad():
        steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(12)]
        assert torch.allclose(torch.cat(steps, 1), model(ids).logits, atol=1e-5)


def test_selfgen_needs_a_teacher_with_enough_context(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = selfgen_data(tmp_path)
    with pytest.raises(ValueError, match="needs one; set model.teacher"):
        build_datamodule(data, tokenizer, total_batches=1)
    data.sequence_length = 64
    with pytest.raises(ValueError, match="sequence_length=64 is above the model's context of 32"):
        sampled(data, tokenizer)
