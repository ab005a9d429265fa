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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qat.data.seams import encode_pieces
from qat.data.sources import BUILTIN, Source, read_documents
from qat.storage import local, new_file, write_text
from qat.terminal.stage import Stage, stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VERSION = 1
_TYPES = {name: np.dtype(name) for name in ("<u2", "<u4")}
_BLOCK = 1 << 24  # bytes read at once for the checksum


def cache_folder(configured: str | None) -> Path:
    """`data.cache_dir`, else $QAT_CACHE, else ~/.cache/qat."""
    return local(configured or os.environ.get("QAT_CACHE") or "~/.cache/qat")


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
    name = key("text 3", source.fingerprint(), tokenizer_hash(tokenizer), max_tokens)
    found = read(folder, name)
    if found is not None:
        return found
    blocks, vocabulary = _limited(_encode(source, tokenizer), max_tokens), max(tokenizer.get_vocab().values()) + 1
    with stage(f"tokenizing {source.title}", max_tokens, "tokens") as shown:
        return write(folder, name, _counted(blocks, shown), vocabulary)


def _counted(blocks: Iterable[list[int]], shown: Stage) -> Iterator[list[int]]:
    for block in blocks:
        yield block
        shown.advance(len(block))


def _limited(blocks: Iterable[list[int]], most: int | None) -> Iterator[list[int]]:
    left = most
    for block in blocks:
        yield block if left is None else block[:left]
        if left is not None:
            left -= len(block)
            if left <= 0:
                return


def _encode(source: Source, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Token ids, document after document.

    A document begins as the tokenizer itself begins a text (with BOS, or with nothing), and EOS stands between documents,
    so that a text of one document has exactly the ids of `tokenizer(text)`: anyone can measure the same perplexity.
    """
    opening = prefix = _prefix(tokenizer)
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    begun = False
    for ids, ends in encode_pieces(read_documents(source), partial(_encodings, tokenizer)):
        if ids:
            yield ids if begun else [*opening, *ids]
        begun = begun or bool(ids)
        if ends and begun:
            opening, begun = [*between, *prefix], False


def _encodings(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Any]:
    out: Any = tokenizer(texts, add_special_tokens=False, padding=False, truncation=False, verbose=False)
    return out.encodings


def glued(source: Source, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether nothing stands between the source's documents: neither EOS nor BOS."""
    has_documents = source.name != BUILTIN and not (source.is_file and source.file().suffix.lower() == ".txt")
    return has_documents and tokenizer.eos_token_id is None and not _prefix(tokenizer)


def _prefix(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What the tokenizer puts before a text: BOS or nothing. A suffix is left out: no document has ended yet."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def read(folder: Path, name: str) -> np.ndarray | None:
    """The cached tokens [T], or None where they are absent or damaged."""
    data = folder / f"{name}.bin"
    try:
        facts = json.loads((folder / f"{name}.json").read_text())
        count, dtype = facts["tokens"], _TYPES[facts["dtype"]]
        if type(count) is not int or data.stat().st_size != count * dtype.itemsize or _checksum(data) != facts["crc32"]:
            return None
        return _mapped(data, dtype, count)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """An empty file cannot be mapped."""
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def write(folder: Path, name: str, blocks: Iterable[Any], vocabulary: int) -> np.ndarray:
    """Store blocks of token ids as one file and return it [T]. Raises ValueError where the disk refuses (full, read-only)."""
    dtype = _TYPES["<u2" if vocabulary <= 1 << 16 else "<u4"]
    try:
        with new_file(folder / f"{name}.bin") as partial:
            crc, count = _fill(partial, blocks, dtype)
        write_text(folder / f"{name}.json", json.dumps({"tokens": count, "dtype": dtype.str, "crc32": crc}))
    except OSError as error:
        raise ValueError(f"cannot write the token cache in {folder}: {error}; free space there or set data.cache_dir") from error
    return _mapped(folder / f"{name}.bin", dtype, count)


def _fill(path: Path, blocks: Iterable[Any], dtype: np.dtype) -> tuple[int, int]:
    crc = count = 0
    with path.open("wb") as file:
        for block in blocks:
            raw = np.asarray(block, dtype=dtype).tobytes()
            file.write(raw)
            crc = zlib.crc32(raw, crc)
            count += len(raw) // dtype.itemsize
    return crc, count
