"""Chat templates are ended when they take too long, too much or the process with them."""

from __future__ import annotations

import os
import time

import pytest
from chats import CHATML, bytewise, say

from qat.data.chat import encode
from qat.data.chat.rendering import Renderer, Request, TemplateStopped

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", [LOOPS, "{{ 9**(9**9) }}", "{% generation %}" + LOOPS + "{% endgeneration %}"])
def test_endless_templates_are_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.data.chat.rendering.SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(TemplateStopped, match="chat: the chat template takes more than 1 s for one chat"):
        encode(say("a", "b"), bytewise(template))
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**11 }}", "MemoryError"),
        ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "it makes more than 16,777,216 characters"),
    ],
)
def test_templates_that_take_too_much_are_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"refuses this chat .*{message}"):
        encode(say("a", "b"), bytewise(template))


def test_a_process_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.data.chat.rendering._answers", lambda *_: os._exit(7))
    with Renderer(bytewise(CHATML)) as renderer, pytest.raises(TemplateStopped, match=r"ended its process \(exit code 7\)"):
        renderer([Request(say("a"))])


def test_the_process_answers_as_the_tokenizer_does_and_ends_with_the_block() -> None:
    tokenizer = bytewise(CHATML)
    with Renderer(tokenizer) as renderer:
        [rendered] = renderer([Request(say("a", "b"), prompt=True)])
        assert rendered.text == tokenizer.apply_chat_template(say("a", "b"), tokenize=False, add_generation_prompt=True)
        assert renderer._running is not None
        process = renderer._running[0]
        assert process.is_alive()
    assert not process.is_alive()
