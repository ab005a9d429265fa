"""From a DataConfig to a ready QATData: reads, tokenizes or samples what was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qat.config import DataConfig
from qat.data import tokens
from qat.data.chat import Chats, read_chats
from qat.data.datamodule import QATData
from qat.data.mixture import Mixture
from qat.data.order import Windows
from qat.data.selfgen import sampled_tokens
from qat.data.sources import BUILTIN, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Arrays = tuple[np.ndarray, np.ndarray]
Names = tuple[str, str]


def build_datamodule(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    teacher: PreTrainedModel | None = None,
    seed: int = 0,
    total_batches: int,
    progress: bool = True,
) -> QATData:
    """Read, tokenize or sample what `data` asks for. `total_batches`: batches a device in the whole run, steps * accumulation.

    Raises ValueError for any missing, empty, unreadable or too short source, and for selfgen without a teacher.
    """
    if data.kind == "chat":
        chats, names, notes = _chat_parts(data, tokenizer)
        return QATData(data, chats, names, seed=seed, total_batches=total_batches, notes=notes)
    notes = [] if data.kind == "selfgen" else _text_notes(data, tokenizer)
    if data.kind == "mixed":
        mixture, held_out, names = _mixed_parts(data, tokenizer, teacher, seed, progress)
        return QATData(data, (mixture, held_out), names, seed=seed, total_batches=total_batches, notes=notes)
    if data.kind == "selfgen":
        arrays, names = _sampled_parts(data, tokenizer, teacher, seed, progress)
    else:
        arrays, names = _text_parts(data, tokenizer)
    windows = _windows(arrays[0], data, names[0]), _windows(arrays[1], data, names[1])
    return QATData(data, windows, names, seed=seed, total_batches=total_batches, notes=notes)


def check_text(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Read and tokenize what of `data` is text, so that what is wrong with it is said before anything is sampled."""
    if data.kind == "mixed":
        for array, name in zip(*_text_parts(data, tokenizer), strict=True):
            _windows(array, data, name)


def _mixed_parts(
    data: DataConfig, tokenizer: Any, teacher: PreTrainedModel | None, seed: int, progress: bool
) -> tuple[Mixture, Windows, Names]:
    """Text and samples to train on, and text to validate on."""
    (text, held_out), names = _text_parts(data, tokenizer)
    parts = _windows(text, data, names[0]), _windows(_sampled(data, tokenizer, teacher, seed, progress), data, "self-generated")
    mixture = Mixture(parts, data.selfgen.share)
    title = f"{names[0]} and {100 * data.selfgen.share:g} % self-generated"
    return mixture, _windows(held_out, data, names[1]), (title, names[1])


def _text_notes(data: DataConfig, tokenizer: Any) -> list[str]:
    """What is said of documents that a model cannot tell apart."""
    source = _source(data)
    if not tokens.glued(source, tokenizer):
        return []
    return [f"the tokenizer has no end-of-sequence token, so nothing stands between the documents of {source.title}"]


def _sampled_parts(
    data: DataConfig, tokenizer: Any, teacher: PreTrainedModel | None, seed: int, progress: bool
) -> tuple[Arrays, Names]:
    train, valid = (_sampled(data, tokenizer, teacher, seed, progress, valid=v) for v in (False, True))
    return (train, valid), ("self-generated", "held-out self-generated")


def _sampled(
    data: DataConfig, tokenizer: Any, teacher: PreTrainedModel | None, seed: int, progress: bool, *, valid: bool = False
) -> np.ndarray:
    if teacher is None:
        raise ValueError(f"data={data.kind} samples from the full-precision model, so it needs one; set model.teacher=shared")
    folder = tokens.cache_folder(data.cache_dir)
    return sampled_tokens(
        teacher, tokenizer, data.selfgen, data.sequence_length, valid=valid, seed=seed, folder=folder, progress=progress
    )


def _windows(array: np.ndarray, data: DataConfig, name: str) -> Windows:
    if len(array) < data.sequence_length:
        short = f"{len(array)} tokens, fewer than one sequence (data.sequence_length={data.sequence_length})"
        raise ValueError(f"data: {name} has {short}")
    return Windows(array, data.sequence_length)


def _source(data: DataConfig, *, valid: bool = False) -> Source:
    field = data.messages_field if data.kind == "chat" else data.text_field
    name = (data.valid if valid else data.train) or ""
    if not name:
        raise ValueError("data.train is missing; give a .txt, .jsonl or .parquet file or the name of a hub data set")
    return Source(name, field, data.valid_split if valid else data.train_split, data.subset)


def _text_parts(data: DataConfig, tokenizer: Any) -> tuple[Arrays, Names]:
    """Training and held-out tokens and their names; without data.valid the last `valid_fraction` of the tokens is held out."""
    source, folder = _source(data), tokens.cache_folder(data.cache_dir)
    train = tokens.tokenize(source, tokenizer, folder, data.max_tokens)
    if data.valid is not None:
        held_out = _source(data, valid=True)
        return (train, tokens.tokenize(held_out, tokenizer, folder)), (source.title, held_out.title)
    cut = len(train) - int(len(train) * data.valid_fraction)
    return (train[:cut], train[cut:]), (source.title, _last_part(data, source))


def _last_part(data: DataConfig, source: Source) -> str:
    return f"last {100 * data.valid_fraction:g} % of {source.title}"


def _chat_parts(data: DataConfig, tokenizer: Any) -> tuple[tuple[Chats, Chats], Names, list[str]]:
    """The same for chats, and notes; at least one is held out."""
    source = _source(data)
    chats, notes = read_chats(source, tokenizer, data.max_tokens)
    if data.valid is not None:
        names = source.title, _source(data, valid=True).title
        held_out, more = read_chats(_source(data, valid=True), tokenizer)
        notes += more
    else:
        names = source.title, _last_part(data, source)
        cut = len(chats) - max(1, int(len(chats) * data.valid_fraction))
        chats, held_out = chats[:cut], chats[cut:]
    return (_padded(chats, data, tokenizer, names[0]), _padded(held_out, data, tokenizer, names[1])), names, notes


def _padded(chats: list[Any], data: DataConfig, tokenizer: Any, name: str) -> Chats:
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    part = Chats(chats, data.sequence_length, pad)
    if not len(part):
        raise ValueError(f"data: {name} has no chat with an assistant's word in the first {data.sequence_length} tokens")
    return part


def text_tokens(source: str, tokenizer: PreTrainedTokenizerFast, data: DataConfig, max_tokens: int | None) -> torch.Tensor:
    """The first `max_tokens` tokens of a further text, int64 [T], through the same cache.

    `source` is a .txt, .jsonl or .parquet file, a hub data set (its `data.valid_split`), or `pydoc_data.topics`.
    """
    place = Source(source, data.text_field, data.valid_split, None if source == BUILTIN else data.subset)
    array = tokens.tokenize(place, tokenizer, tokens.cache_folder(data.cache_dir), max_tokens)
    return torch.from_numpy(array.astype(np.int64))
