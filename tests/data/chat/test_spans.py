"""The assistant's tokens, by marks or by prefixes, under templates and tokenizers of several kinds."""

from __future__ import annotations

from typing import Any

import pytest
from chats import CHATML, MARKED, bytewise, say
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qat.data.chat import encode

BARE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
SYSTEM = "{% if messages[0].role != 'system' %}<system>Be good$\n{% endif %}" + CHATML


def learned(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of the learned tokens, `|` between runs of them."""
    ids, mask = encode(messages, tokenizer)
    runs: list[list[int]] = []
    for i, (token, inside) in enumerate(zip(ids, mask, strict=True)):
        if inside and (i == 0 or not mask[i - 1]):
            runs.append([])
        if inside:
            runs[-1].append(token)
    return "|".join(bytes_of(run, tokenizer) for run in runs)


def bytes_of(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    vocabulary = {character: byte for byte, character in byte_characters().items()}
    characters = "".join(tokenizer.convert_ids_to_tokens(ids))
    return bytes(vocabulary[c] for c in characters).decode()


def byte_characters() -> dict[int, str]:
    """GPT-2's table."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(rest)}


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (BARE, say("A", "secret", "B", first="assistant"), "A|B"),
        (BARE, say("same", "same", "same", "same"), "same|same"),
        (BARE, say("q", "ends in blanks  ", " q"), "ends in blanks  "),
        (BARE, say("q", "", "after nothing", "x"), "x"),
        (BARE, say("🙂", "é日本🙂", "x"), "é日本🙂"),
        (MARKED, say("hi", "yo $<user>", "q", "a"), "yo $<user>$|a$"),
        (MARKED.replace("{% generation %}", "\n  {%- generation -%}\n "), say("a", "b"), "b$"),
        ("{% macro t(m) %}" + BARE.split("%}", 1)[1].rsplit("{%", 1)[0] + "{% endmacro %}"
         "{% for m in messages %}{{ '>' + t(m) }}{% endfor %}", say("a", "b", "cc", "d"), "b|d"),
        ("{% set out %}" + BARE + "{% endset %}{{ 'head ' + out }}", say("a", "b"), "b"),
        (BARE.replace("{{ m.content }}{% endgeneration %}", "{{ m.content }}\n{% endgeneration %}\n"), say("a", "b", "c"), "b\n"),
        (CHATML, say("same", "same"), "same$"),
        (CHATML, say("q", "é 🙂", "r", " s "), "é 🙂$| s $"),
        (CHATML, say("A", "q", "B", first="assistant"), "A$|B$"),
        (SYSTEM, say("A", "q", "B", first="assistant"), "A$|B$"),
        (SYSTEM.replace("m.content", "m.content|trim"), say("  A", "q", "B", first="assistant"), "A$|B$"),
        (SYSTEM, [{"role": "system", "content": "s"}, *say("A", "q", first="assistant")], "A$"),
    ],
)  # fmt: skip
def test_only_the_assistants_bytes_are_learned(template: str, messages: list, expected: str, trim: bool) -> None:
    assert learned(messages, bytewise(template, trim=trim)) == expected


def test_sentencepiece_offsets_end_where_the_words_do() -> None:
    vocabulary = [("<unk>", 0.0), *((c, -1.0) for c in "▁abcsxyz:"), ("▁a", -0.5)]
    backend = Tokenizer(models.Unigram(vocabulary, 0, False))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.chat_template = BARE.replace("{% else %}{{ m.content }}", "{% else %}{{ m.content + ':' }}")
    ids, mask = encode(say("a b", "c a ", "x", "y", "z"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids[mask]) == ["c", "▁a", "▁", "y"]


def test_a_tokenizer_that_cuts_and_pads_does_not_reach_the_mask() -> None:
    tokenizer = bytewise(BARE)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert learned(say("question", "answer", "more"), tokenizer) == "answer"


def test_marks_that_are_changed_afterwards_are_refused() -> None:
    template = "{% set out %}" + BARE + "{% endset %}{{ out | reverse }}"
    with pytest.raises(ValueError, match="chat: what the chat template marks .* cannot be found"):
        encode(say("a", "b"), bytewise(template))


def test_a_weight_of_zero_is_not_learned() -> None:
    messages: list[dict[str, Any]] = say("Hi", "bad", "no", "good")
    messages[1]["weight"] = 0
    assert learned(messages, bytewise(CHATML)) == "good$"
    assert learned(messages, bytewise(MARKED)) == "good$"
    half = MARKED.replace("{% if m.role == 'assistant' %}", "{% if loop.last %}")
    with pytest.raises(ValueError, match="assistant's 2 messages .* marks 1 parts"):
        encode(messages, bytewise(half))


def test_named_templates_are_chosen_by_tools() -> None:
    tokenizer = bytewise("")
    tokenizer.chat_template = {"default": CHATML, "tool_use": MARKED}
    assert learned(say("a", "b"), tokenizer) == "b$"


def test_calls_of_tools_are_learned_where_the_template_writes_them() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "w", "arguments": "{}"}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "sun"}]
    messages.append({"role": "assistant", "content": "Sun."})
    written = "m.content + (m.tool_calls[0].function | tojson if m.tool_calls else '')"
    assert learned(messages, bytewise(CHATML.replace("m.content", written))) == '{"name": "w", "arguments": {}}$|Sun.$'
    with pytest.raises(
        ValueError, match="message 2 of the roles user, assistant, tool, assistant has tool_calls, which .* not render"
    ):
        encode(messages, bytewise(CHATML))
    messages[1]["weight"] = 0
    assert learned(messages, bytewise(CHATML)) == "Sun.$"
