"""Which records are chats, and what is said of those that are not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qat.data.chat.forms import Chat, chat_of

USER, SAYS = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "1", "type": "function", "function": {"name": "w", "arguments": '{"at": 3}'}}


def read(record: dict[str, Any]) -> Chat:
    return chat_of(record, "f:1")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, SAYS]},
        {"messages": json.dumps([USER, SAYS])},
        {"messages": [USER | {"name": None, "tool_calls": None}, SAYS | {"tool_calls": []}], "tools": None},
        {"messages": [USER | {"content": [{"type": "text", "text": "q"}]}, SAYS | {"content": [{"type": "text", "text": "a"}]}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": json.dumps([{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}])},
        {"conversations": [USER, SAYS]},
        {"conversation": [{"role": "human", "content": "q"}, {"role": "model", "content": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [SAYS]},
        {"prompt": [USER], "completion": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"messages": [USER, SAYS], "weight": 1, "system": ""},
    ],
)
def test_chats_in_other_words_are_the_same_chat(record: dict[str, Any]) -> None:
    chat = read(record)
    assert chat.messages == [USER, SAYS] and chat.learned == [False, True]
    assert (chat.tools, chat.options) == (None, {})


def test_of_prompt_and_completion_only_the_completion_is_learned() -> None:
    assert read({"prompt": [USER, SAYS, USER], "completion": [SAYS]}).learned == [False, False, False, True]


def test_weights_choose_what_is_learned() -> None:
    assert read({"messages": [USER, SAYS | {"weight": 0}, USER, SAYS | {"weight": 1.0}]}).learned == [False, False, False, True]
    assert read({"messages": [USER, SAYS | {"train": False}, USER, SAYS]}).learned == [False, False, False, True]
    assert read({"messages": [USER, SAYS], "weight": 0}).learned == [False, False]
    assert "weight" not in read({"messages": [USER, SAYS | {"weight": 0}]}).messages[1]


def test_tools_calls_and_options_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "w"}}]
    chat = read({
        "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "sun"}, SAYS],
        "tools": json.dumps(tools), "chat_template_kwargs": {"enable_thinking": False}, "system": "be good", "id": 7,
    })  # fmt: skip
    assert chat.tools == tools and chat.options == {"enable_thinking": False} and chat.unused == ("id",)
    assert chat.messages[0] == {"role": "system", "content": "be good"}
    assert chat.messages[2]["content"] == "" and chat.messages[2]["tool_calls"][0]["function"]["arguments"] == {"at": 3}
    assert chat.learned == [False, False, True, False, True]


def test_a_call_in_sharegpt_is_an_assistants() -> None:
    turns = [("human", "q"), ("function_call", '{"name": "w", "arguments": {"at": 3}}'), ("observation", "sun"), ("gpt", "a")]
    chat = read({"conversations": [{"from": role, "value": text} for role, text in turns]})
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "w", "arguments": {"at": 3}}}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "f:1: there is no field 'messages'; its fields are 'text'; a chat is messages, conversations"),
        ({"chosen": [USER, SAYS], "rejected": [USER, SAYS]}, "pairs of preference"),
        ({"messages": "hello"}, "f:1: 'messages' holds text that is not JSON: 'hello'"),
        ({"messages": []}, "f:1: a chat must be a non-empty list .* 'messages' holds an empty list"),
        ({"messages": {"role": "user"}}, "holds dict"),
        ({"messages": [USER, "a"]}, "message 2 is str"),
        ({"messages": [USER, {"content": "a"}]}, "f:1: message 2 of the roles user, none has no role; its fields are 'content'"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 of the roles user, assistant has no content"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]}, "message 2 .* has no content"),
        ({"messages": [USER, SAYS | {"content": 3}]}, "message 2 .* has a content of int"),
        ({"messages": [USER | {"content": [{"type": "image", "url": "x"}]}, SAYS]}, "message 1 .* has a part of type image"),
        ({"messages": [USER, SAYS | {"weight": 0.5}]}, "message 2 .* has weight 0.5; allowed are 0 and 1"),
        ({"messages": [USER, SAYS | {"weight": float("nan")}]}, "has weight nan"),
        ({"messages": [USER, SAYS | {"weight": "0"}]}, "has weight '0'"),
        ({"messages": [USER, SAYS | {"tool_calls": "w()"}]}, "message 2 .* has tool_calls that are no list"),
        ({"messages": [USER, USER | {"role": "Narrator"}]}, "is said by the assistant; its roles are user, Narr"),
        ({"messages": [USER, SAYS], "weight": 2}, "f:1: the column 'weight' is 2"),
        ({"messages": [USER, SAYS], "tools": "w"}, "f:1: 'tools' holds text that is not JSON"),
        ({"messages": [USER, SAYS], "tools": ["w"]}, "f:1: 'tools' must be a list of objects"),
        ({"messages": [USER, SAYS], "chat_template_kwargs": {"tokenize": True}}, "must not set tokenize"),
        ({"messages": [{"role": "system", "content": "s"}, USER, SAYS], "system": "t"}, "a column 'system' too"),
        ({"instruction": "add", "input": "1 2", "output": "3"}, "'instruction' with an 'input' has no one reading"),
        ({"prompt": [USER], "completion": [USER]}, "'completion' holds no message of the assistant"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "w"}]}, "must be JSON with name"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused_with_the_reason(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(record)
