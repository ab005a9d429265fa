"""A long document has the tokens of its whole text, whatever kind of tokenizer reads it."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qat.data import seams, tokens
from qat.data.sources import Source


def corpus(characters: int = 60_000) -> str:
    """Words, numbers, runs of spaces and line ends, letters of several bytes, a special token now and then."""
    draw = random.Random(0)
    words = [
        "the",
        "cat",
        "café",
        "naïve",
        "12345678",
        "  ",
        "\n\n",
        "\n",
        "\t",
        "日本語",
        "🙂👩‍👩‍👧",
        "<sep>",
        "Über",
        "it's",
        "e\u0301",
        "x" * 40,
    ]
    parts: list[str] = []
    while sum(map(len, parts[-1:])) + len(parts) * 5 < characters:
        parts.append(draw.choice(words))
    return " ".join(parts)


def trained(model, trainer, *, normalizer=None, split=None, post=None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if split is not None:
        backend.pre_tokenizer = split
    backend.train_from_iterator([corpus(8_000)], trainer)
    if post is not None:
        backend.post_processor = post
    backend.add_special_tokens([AddedToken("<sep>", rstrip=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def llama() -> PreTrainedTokenizerFast:
    """No splitting at all: the whole text is one word; the space before it comes from a normalizer."""
    rules = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = trained(
        models.BPE(byte_fallback=True), trainers.BpeTrainer(vocab_size=120, show_progress=False), normalizer=rules
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(vocab_size=90, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    rules = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    return trained(
        models.Unigram(), trainer, normalizer=rules, split=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    )


def byte_level() -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(vocab_size=320, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    split, post = pre_tokenizers.ByteLevel(add_prefix_space=True), processors.ByteLevel(trim_offsets=True)
    return trained(models.BPE(), trainer, split=split, post=post)


def bert() -> PreTrainedTokenizerFast:
    trainer = trainers.WordPieceTrainer(vocab_size=90, show_progress=False, special_tokens=["[UNK]"])
    words, split = models.WordPiece(unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer()  # type: ignore[call-arg]
    return trained(words, trainer, normalizer=normalizers.BertNormalizer(), split=split)


KINDS = {
    "llama": llama,
    "metaspace first": partial(metaspace, "first"),
    "metaspace always": partial(metaspace, "always"),
    "byte level": byte_level,
    "bert": bert,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.data.sources.PIECE", 5_000)
    monkeypatch.setattr(seams, "OVERLAP", 1_000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("small")
def test_a_text_in_pieces_has_the_tokens_of_the_whole(kind: str, tmp_path: Path) -> None:
    tokenizer, text = KINDS[kind](), corpus()
    (tmp_path / "a.txt").write_text(text, newline="")
    joined = []
    seam, found = seams._seam, joined.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seams, "_seam", lambda *arguments: found(seam(*arguments)) or joined[-1])
        array = tokens.tokenize(Source(str(tmp_path / "a.txt")), tokenizer, tmp_path / "cache")
    assert array.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(joined) > 5 and None not in joined  # it was tokenized in pieces indeed


@pytest.mark.parametrize("text", ["a" * 23_001, "7" * 17_003, " " * 12_001 + "b", "ab " * 7_000 + "c" * 9_000 + " ab" * 3_000])
@pytest.mark.parametrize("kind", ["llama", "byte level", "bert"])
@pytest.mark.usefixtures("small")
def test_where_nothing_agrees_the_pieces_are_tokenized_as_one(kind: str, text: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind]()
    pieces = [(text[i : i + 5_000], i + 5_000 >= len(text)) for i in range(0, len(text), 5_000)]
    found = list(seams.encode_pieces(pieces, partial(tokens._encodings, tokenizer)))
    assert [i for ids, _ in found for i in ids] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [ends for _, ends in found].count(True) == 1 and found[-1][1]


def test_documents_after_a_long_one_begin_anew(tmp_path: Path, small: None, tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = [("ab " * 1_500, False), ("cd " * 1_500, True), ("ef", True)]
    found = list(seams.encode_pieces(pieces, partial(tokens._encodings, tokenizer)))
    assert found[-1] == (tokenizer("ef")["input_ids"], True)
    assert [i for ids, _ in found[:-1] for i in ids] == tokenizer("ab " * 1_500 + "cd " * 1_500)["input_ids"]
