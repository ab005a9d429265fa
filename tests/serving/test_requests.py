"""Fields of a request: each wrong value is told with what is allowed, before a model sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qat.serving.requests import Refused, check, parse, room

HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object, not list"),
        (b'"x"', "must be a JSON object, not str"),
        (b'{"temperature": NaN}', "NaN is no number of JSON"),
        (b'{"temperature": -Infinity}', "-Infinity is no number"),
        (b'{"prompt": "\xff"}', "not JSON in UTF-8"),
        (b'{"prompt": "\\ud800"}', "not JSON in UTF-8"),
        (b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_bodies_that_are_no_json_object(body: bytes, message: str) -> None:
    with pytest.raises(Refused, match=message) as refused:
        parse(body)
    assert refused.value.status == 400 and "\n" not in str(refused.value)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens=0 is not allowed; it must be a whole number from 1"),
    ({"max_tokens": -1}, "max_tokens=-1"),
    ({"max_tokens": 2.5}, "max_tokens=2.5"),
    ({"max_tokens": True}, "max_tokens=True"),
    ({"max_tokens": "9"}, "max_tokens='9'"),
    ({"max_completion_tokens": 10**30}, "max_completion_tokens=int"),
    ({"temperature": -0.1}, "temperature=-0.1 is not allowed; it must be 0 .* or from 0.001 to 2"),
    ({"temperature": 1e-40}, "temperature=1e-40"),
    ({"temperature": 1e300}, r"temperature=1e\+300"),
    ({"temperature": "hot"}, "temperature='hot'"),
    ({"temperature": [1]}, "temperature=list"),
    ({"top_p": 0}, "top_p=0 is not allowed; it must be above 0 and at most 1"),
    ({"top_p": 1.01}, "top_p=1.01"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 2**63}, "seed=int"),
    ({"stop": [""]}, "stop must be a string or up to 4"),
    ({"stop": ["a"] * 5}, "stop must be"),
    ({"stop": "x" * 65}, "stop must be"),
    ({"stop": {"a": 1}}, "stop must be"),
    ({"stream": "yes"}, "stream='yes' is not allowed; it must be true or false"),
    ({"stream": 1}, "stream=1"),
    ({"n": 2}, "n=2 is not supported here; allowed is 1"),
    ({"n": 1.0}, "n=1.0"),
    ({"presence_penalty": 0.5}, "presence_penalty=0.5 is not supported"),
    ({"frequency_penalty": -1}, "frequency_penalty=-1 is not supported"),
    ({"logit_bias": {"1": 100}}, "logit_bias=dict is not supported"),
    ({"logprobs": True}, "logprobs=True is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"generation_config": "{}"}, "'generation_config' is not known; allowed are"),
    ({"chat_template_kwargs": {}}, "'chat_template_kwargs' is not known"),
    ({"\u65e5\u672c": 1}, "is not known"),
    ({"messages": []}, "messages must be a list of 1 to 1024 messages"),
    ({"messages": "hello"}, "messages must be a list"),
    ({"messages": [1]}, r"messages\[0\] must be an object"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "role='wizard' is not allowed; choose one of"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "role=list"),
    ({"messages": [{"role": "user"}]}, "content must be a string, not None"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "model of text"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "'tool_calls' is not supported"),
    ({"tools": [1]}, "tools must be a list of objects"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(fields)[:40] for fields, _ in BAD])
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message) as refused:
        check({"messages": HELLO, **fields}, True, "m")
    assert refused.value.status == 400 and len(str(refused.value)) < 700 and "\n" not in str(refused.value)


def test_a_prompt_is_one_text() -> None:
    for prompt in ("", [], ["a"], 5, [1, 2]):
        with pytest.raises(Refused, match="prompt must be a string that is not empty"):
            check({"prompt": prompt}, False, "m")
    with pytest.raises(Refused, match="prompt is missing"):
        check({}, False, "m")
    with pytest.raises(Refused, match="messages is missing"):
        check({"messages": None}, True, "m")


def test_another_model_is_not_found() -> None:
    with pytest.raises(Refused, match="'gpt' is not served here, only 'm'") as refused:
        check({"model": "gpt", "messages": HELLO}, True, "m")
    assert refused.value.status == 404


def test_what_is_asked_arrives() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 7, "temperature": 0.5, "top_p": 1}
    body |= {"seed": 3, "stop": "x", "stream": True, "n": 1, "user": "me", "frequency_penalty": 0, "logit_bias": None}
    asked = check(json.loads(json.dumps(body)), True, "m")
    assert asked.prompt == [{"role": "user", "content": "a b"}] and (asked.max_tokens, asked.temperature, asked.top_p) == (
        7,
        0.5,
        1.0,
    )
    assert (asked.seed, asked.stop, asked.stream, asked.tools) == (3, ["x"], True, None)
    assert check({"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 6}, True, "m").max_tokens == 6


def test_answers_fit_into_the_context() -> None:
    assert room(10, 1000, 64, 1024) == 54 and room(10, 5, 64, 1024) == 5 and room(10, None, 64, 32) == 32
    assert room(63, None, 64, 1024) == 1
    with pytest.raises(Refused, match="the prompt has 64 tokens, but the model's context is 64; shorten it"):
        room(64, 1, 64, 1024)
    with pytest.raises(Refused, match="the prompt has no tokens"):
        room(0, 1, 64, 1024)
