"""How texts are split before byte-level BPE: the rules that both llama.cpp and tokenizer.json can name, and where two differ.

GGUF holds a name, tokenizer.json the rule. A name is not believed: its rule and the tokenizer's own are applied to texts in
which everything meets that some rule treats apart (`battery`), and must cut them alike. The way back: `set_split` gives a
tokenizer that was read from a file the split that the file names, of which transformers reads nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {  # the regular expression of a Split in tokenizer.json -> llama.cpp's name for it
    _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + _WORDS + r"\p{N}" + _REST: "qwen2",
}
_ALIASES = {  # our name -> what else llama.cpp calls the same split (tried with llama-cpp-python 0.3.36)
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "trillion", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en",
              "gigachat", "a.x-4.0", "mellum", "modern-bert", "roberta-bpe", "granite-docling"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "stablelm2", "hunyuan", "megrez"),
}  # fmt: skip
_NAMED = {name: ours for ours, others in _ALIASES.items() for name in (ours, *others)}

_SAMPLES = {
    "letters": "ab Ab AB é ß ﬁ ñandú Ω σίγμα Привет Ёж հայ",
    "further letters": "שלום سلام नमस्ते বাংলা தமிழ் ไทย ລາວ ქართული 한국어 ひらがな カタカナ 漢字 አማርኛ",
    "marks": "x̌ q̃ا̄ कि ก็ ָ ़",
    "digits": "1 12 123 1234 12345 1234567 ٣ ١٢٣٤ १२३४ ４５６７ ² ½ Ⅷ ①②③④",
    "contractions": "'s 't 're 've 'm 'll 'd 'S 'T 'RE 'VE 'M 'LL 'D 'Re 'lL ’s 'x 'sa it's IT'S we'LL",
    "punctuation": "! ? . , ; : - _ ' \" ( ) [ ] { } / \\ @ # % & * « » „ “ ” … — 、 。 「 ！ ؟ । ... !!! ?! --- ({[ _a a_b",
    "symbols": "$ € + = < > ^ ` | ~ © → ∑ ° $1 €5 == -> #a @b",
    "emoji": "🙂 🙂🙂 👍🏽 👩‍👩‍👧 🇩🇪 1️⃣ ❤️",
}
_SPACES = (" ", "  ", "   ", "\t", "\n", "\n\n", "\n\n\n", " \n", "\n ", " \n ", "\r\n", "\r", "\t ")
_OTHER_SPACES = ("\u00a0", "\u3000", "\u2003")


def samples() -> list[str]:
    """Words of each kind, and runs of spaces."""
    return [word for words in _SAMPLES.values() for word in words.split(" ")] + [*_SPACES, *_OTHER_SPACES]


def surrounded() -> Iterator[str]:
    """Each sample alone and beside a letter, a digit, a full stop, spaces and lines."""
    for one in samples():
        yield one
        for other in ("a", "A", "1", "12", ".", "'", " ", "  ", "\n", "\n\n", "漢", "🙂"):
            yield one + other
            yield other + one


@cache
def battery() -> tuple[str, ...]:
    """Texts in which every sample meets every other, at once and behind a space."""
    every = samples()
    return tuple(dict.fromkeys([*surrounded(), *(a + gap + b for a in every for b in every for gap in ("", " "))]))


def split_name(tokenizer: Any, asked: str | None = None) -> str:
    """llama.cpp's name of a byte-level tokenizer's text split.

    Raises:
        ValueError: it is not recognized and none was `asked` for, or the one that was cuts texts otherwise; with such a text.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]
    found = _recognized(state)
    if asked is None and found is None:
        raise ValueError(f"the text split {json.dumps(state)} is not recognized; name llama.cpp's own by --pre-tokenizer")
    if asked is None or _NAMED.get(asked, asked) == found:
        return asked or str(found)
    if found is not None and asked not in _NAMED:
        raise ValueError(f"--pre-tokenizer {asked}: the tokenizer splits texts as {', '.join((found, *_ALIASES[found]))} do")
    if asked in _NAMED and (text := _first_difference(tokenizer, asked)) is not None:
        raise ValueError(
            f"--pre-tokenizer {asked} splits {text!r} otherwise than the tokenizer, with which the model was trained"
        )
    return asked


def _first_difference(tokenizer: Any, name: str) -> str | None:
    """The first text that the rule of that name cuts otherwise than the tokenizer does."""
    own, named = tokenizer.backend_tokenizer.pre_tokenizer, _rule(_NAMED[name])
    for text in battery():
        if [piece for piece, _ in own.pre_tokenize_str(text)] != [piece for piece, _ in named.pre_tokenize_str(text)]:
            return text
    return None


def _recognized(pre_tokenizer: Any) -> str | None:
    """Our name of the text split in tokenizer.json; None where it is none of ours."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    splits, last = steps[:-1], steps[-1]
    if last["type"] == "ByteLevel" and last.get("use_regex", True):
        if not splits:
            return "gpt-2"
        if len(splits) == 1 and splits[0] == {"type": "Digits", "individual_digits": True}:
            return "smollm"
    elif len(splits) == 1 and splits[0]["type"] == "Split" and splits[0]["behavior"] == "Isolated":
        return _SPLITS.get(splits[0]["pattern"].get("Regex", ""))
    return None


def _rule(name: str) -> Any:
    """The pre-tokenizer of one of our names."""
    from tokenizers import Regex, pre_tokenizers

    patterns = {ours: pattern for pattern, ours in _SPLITS.items()}
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
    if name in patterns:
        steps = [pre_tokenizers.Split(Regex(patterns[name]), "isolated")]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in patterns)
    return pre_tokenizers.Sequence([*steps, level]) if steps else level


def set_split(tokenizer: Any, pre: str) -> bool:
    """Make a byte-level tokenizer split texts as llama.cpp does under the name `pre`; False where we do not know the name."""
    name = _NAMED.get(pre)
    if name is None:
        return False
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = _rule(name)
    if name == "llama-bpe":
        backend.model.ignore_merges = True  # a piece that is a token stays one, whatever the merges say
    return True
