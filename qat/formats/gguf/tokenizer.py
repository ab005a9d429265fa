"""A fast transformers tokenizer as GGUF metadata: vocabulary, merges, special tokens, chat template.

Three of llama.cpp's tokenizers can be the one that a BPE tokenizer.json describes:

    gpt2    byte-level BPE; `pre` names one of the text splits that are compiled into llama.cpp
    llama   spaces are U+2581, unknown characters fall back to bytes; no merges but scores: minus the merge's rank
    gpt2, with the `pre` sarvam-moe   spaces are U+2581, no bytes: llama.cpp drops characters that the vocabulary does not know

Whether it tokenizes alike is not believed but tried: see `qat.formats.gguf.read_back`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from qat.formats.gguf.splits import split_name

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_NO_BYTES = "sarvam-moe"  # of the two that work without bytes, the one that does not force a bos token on every text

WHOLE = "tokenizer.huggingface.json"
"""GGUF's key for a whole tokenizer.json."""


def vocabulary(tokenizer: Any, rows: int, pre: str | None = None) -> dict[str, Any]:
    """Metadata of a tokenizer, all under `tokenizer.`.

    Args:
        tokenizer: a fast transformers tokenizer.
        rows: of the embedding; ids beyond the tokenizer's are filled with unused tokens.
        pre: llama.cpp's name of the text split, where it is not recognized or recognized wrongly.

    Raises:
        ValueError: llama.cpp has no such tokenizer; the reason is named.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kind, level = _kind(state)
    ids = tokenizer.get_vocab()
    if len(ids) and max(ids.values()) >= rows:
        raise ValueError(f"the tokenizer has the id {max(ids.values())}, but the embedding only {rows} rows")
    tokens = [f"[PAD{i}]" for i in range(rows)]
    for token, i in ids.items():
        tokens[i] = token
    merges = [_pair(merge) for merge in state["model"]["merges"]]
    values: dict[str, Any] = {
        "model": kind,
        "tokens": tokens,
        "token_type": _types(tokenizer, tokens, set(ids.values()), kind, level),
        **_special_ids(tokenizer),
        **_added(tokenizer, kind),
    }
    if kind == "llama":
        values["scores"] = _scores(tokens, merges)
    else:
        values["merges"] = [" ".join(pair) for pair in merges]
        values["pre"] = split_name(tokenizer, pre) if level else pre or _NO_BYTES
    found = {_PREFIX + key: value for key, value in values.items()}
    if kind == "gpt2" and not level:
        found[WHOLE] = tokenizer.backend_tokenizer.to_str()  # transformers builds none from the rest
    return {**found, **_chat_templates(getattr(tokenizer, "chat_template", None))}


def _chat_templates(given: Any) -> dict[str, Any]:
    """One template, or several by name: those that are not the default have keys of their own and are listed."""
    named = given if isinstance(given, dict) else {"default": given} if given else {}
    keys = {name: re.sub(r"[^A-Za-z0-9]", "_", name) for name in named}  # as the gguf package writes names
    for name, template in named.items():
        if not isinstance(template, str) or list(keys.values()).count(keys[name]) > 1 or not name:
            raise ValueError(f"the chat template {name!r} is no text, or its name is another's in GGUF ({keys[name]!r})")
    others = sorted(key for key in keys.values() if key != "default")
    found: dict[str, Any] = {f"{_TEMPLATE}.{keys[name]}": text for name, text in named.items() if keys[name] != "default"}
    found |= {f"{_TEMPLATE}s": others} if others else {}
    return {**found, **({_TEMPLATE: named["default"]} if "default" in named else {})}


def _kind(state: dict[str, Any]) -> tuple[str, bool]:
    """llama.cpp's kind of tokenizer, and whether it is byte-level."""
    model, text = state["model"], json.dumps([state["normalizer"], state["pre_tokenizer"]], ensure_ascii=False)
    if model["type"] != "BPE":
        raise ValueError(f"a {model['type']} tokenizer is not done for gguf, only BPE")
    if "ByteLevel" in text:
        return "gpt2", True
    if SPACE in text:
        return "llama" if model.get("byte_fallback") and "<0x00>" in model["vocab"] else "gpt2", False
    raise ValueError("this BPE tokenizer neither works on bytes nor writes spaces as U+2581; llama.cpp has no such one")


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _types(tokenizer: Any, tokens: list[str], used: set[int], kind: str, level: bool) -> list[int]:
    types = [NORMAL if i in used else UNUSED for i in range(len(tokens))]
    if kind == "llama":
        types = [BYTE if _is_byte(token) else types[i] for i, token in enumerate(tokens)]
    for i, added in tokenizer.added_tokens_decoder.items():
        types[i] = CONTROL if added.special else USER_DEFINED
    if tokenizer.unk_token_id is not None and not level:
        types[tokenizer.unk_token_id] = UNKNOWN
    return types


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _special_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of special tokens. Without an end, llama.cpp takes some ordinary token for it: one that texts never hold stands in."""
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "unknown_token_id": "unk", "padding_token_id": "pad"}
    found = {key: i for key, name in keys.items() if (i := getattr(tokenizer, f"{name}_token_id")) is not None}
    spare = next((found[key] for key in ("eos_token_id", "padding_token_id", "unknown_token_id") if key in found), None)
    if spare is None:
        raise ValueError("the tokenizer has no eos, pad or unk token, and llama.cpp would stop at an ordinary one instead")
    return {"bos_token_id": spare, "eos_token_id": spare, **found}


def _added(tokenizer: Any, kind: str) -> dict[str, bool]:
    """What the tokenizer puts around a text, found by trying."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    added = {
        "add_bos_token": tokenizer.bos_token_id is not None and whole[:1] == [tokenizer.bos_token_id],
        "add_eos_token": tokenizer.eos_token_id is not None and whole[-1:] == [tokenizer.eos_token_id],
    }
    around = len(whole) - len(plain)
    if around != sum(added.values()):
        raise ValueError(f"the tokenizer adds {around} tokens around a text that are not just its bos and eos token")
    prefix = tokenizer.convert_ids_to_tokens(plain)[0].startswith((SPACE, "Ġ"))
    if kind == "llama":
        return {**added, "add_space_prefix": prefix}
    if prefix:
        raise ValueError("the tokenizer begins a text with a space, which llama.cpp does for byte-fallback tokenizers only")
    return added


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """llama.cpp joins the pair whose result scores highest: minus the rank of the first merge that gives the token."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    never = -float(len(merges))
    return [
        -float(ranks[token]) if token in ranks else (0.0 if len(token) == 1 or _is_byte(token) else never) for token in tokens
    ]
