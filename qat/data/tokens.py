"""The tokenized cache: text becomes one flat file of token ids, memory-mapped afterwards.

Beside `NAME.bin` (little-endian uint16, or uint32 where the vocabulary needs it) lies `NAME.json` with its length and CRC-32.
The .json is renamed into place last, so a pair is whole or absent; a pair that does not fit together (cut short, changed) is
made anew. NAME is a hash of everything that the tokens depend on: the tokenizer, the text, the limit.

Documents are separated by the end-of-sequence token where the tokenizer has one.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qat.data.sources import Source, read_documents
from qat.storage import new_file, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VERSION = 1
_BLOCK = 1 << 24  # bytes read at once for the checksum


def cache_folder(configured: str | None) -> Path:
    """`data.cache_dir`, else $QAT_CACHE, else ~/.cache/qat."""
    return Path(configured or os.environ.get("QAT_CACHE") or "~/.cache/qat").expanduser()


def key(*parts: Any) -> str:
    """A hash of JSON-able parts."""
    return hashlib.sha256(json.dumps([_VERSION, *parts]).encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of everything that decides a tokenizer's ids. Raises ValueError for a slow tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; one with a tokenizer.json is needed")
    rules = json.loads(backend.to_str())
    rules["truncation"] = rules["padding"] = None  # set and unset by whoever used it last
    return key(rules, tokenizer.eos_token_id)


def tokenize(source: Source, tokenizer: PreTrainedTokenizerFast, folder: Path, max_tokens: int | None = None) -> np.ndarray:
    """All tokens of a source (the first `max_tokens`) as a read-only array [T], uint16 or uint32, cached."""
    name = key("text 2", source.fingerprint(), tokenizer_hash(tokenizer), max_tokens)
    found = read(folder, name)
    if found is not None:
        return found
    return write(folder, name, _limited(_encode(source, tokenizer), max_tokens), vocabulary=len(tokenizer))


def _limited(blocks: Iterable[list[int]], most: int | None) -> Iterator[list[int]]:
    left = most
    for block in blocks:
        yield block if left is None else block[:left]
        if left is not None:
            left -= len(block)
            if left <= 0:
                return


def _encode(source: Source, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Token ids, document after document, encoded in batches because the tokenizer uses all cores for a batch.

    A document begins as the tokenizer itself begins a text (with BOS, or with nothing), and EOS stands between documents,
    so that a text of one document has exactly the ids of `tokenizer(text)`: anyone can measure the same perplexity.
    """
    prefix = _prefix(tokenizer)
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    opening = prefix
    for batch in _batches(read_documents(source)):
        encoded = tokenizer(
            [text for text, _ in batch], add_special_tokens=False, padding=False, truncation=False, verbose=False
        )["input_ids"]
        for ids, (_, ends) in zip(encoded, batch, strict=True):
            if ids:
                yield [*opening, *ids]
                opening = [*between, *prefix] if ends else []


def _prefix(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What the tokenizer puts before a text: BOS or nothing. A suffix is left out: no document has ended yet."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def _batches(pieces: Iterable[tuple[str, bool]], characters: int = 1 << 22) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    size = 0
    for text, ends in pieces:
        batch.append((text, ends))
        size += len(text)
        if size >= characters or len(batch) >= 4096:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read(folder: Path, name: str) -> np.ndarray | None:
    """The cached tokens [T], or None where they are absent or damaged."""
    data = folder / f"{name}.bin"
    try:
        facts = json.loads((folder / f"{name}.json").read_text())
        dtype = np.dtype(facts["dtype"])
        if data.stat().st_size != facts["tokens"] * dtype.itemsize or _checksum(data) != facts["crc32"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return np.memmap(data, dtype=dtype, mode="r", shape=(facts["tokens"],))


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def write(folder: Path, name: str, blocks: Iterable[Any], vocabulary: int) -> np.ndarray:
    """Store blocks of token ids as one file and return it [T]. Raises ValueError where the disk refuses (full, read-only)."""
    dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
    try:
        with new_file(folder / f"{name}.bin") as partial:
            crc, count = _fill(partial, blocks, dtype)
        write_text(folder / f"{name}.json", json.dumps({"tokens": count, "dtype": dtype.str, "crc32": crc}))
    except OSError as error:
        raise ValueError(f"cannot write the token cache in {folder}: {error}; free space there or set data.cache_dir") from error
    return np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r", shape=(count,))


def _fill(path: Path, blocks: Iterable[Any], dtype: np.dtype) -> tuple[int, int]:
    crc = count = 0
    with path.open("wb") as file:
        for block in blocks:
            raw = np.asarray(block, dtype=dtype).tobytes()
            file.write(raw)
            crc = zlib.crc32(raw, crc)
            count += len(raw) // dtype.itemsize
    return crc, count
