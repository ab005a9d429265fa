"""One message of a chat, in the words that templates know: {role, content}, whatever it was written in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
"""Other data sets' names for roles. What is not here reaches the template as it is."""

CALL = "function_call"
"""ShareGPT's role of an assistant that calls a tool: its value is the call as JSON."""


@dataclass
class Message:
    """What a template is given, and whether the words are learned."""

    fields: dict[str, Any]
    learned: bool


def refuse(place: str, what: str) -> NoReturn:
    """Raise ValueError: what is wrong with the message at a place."""
    raise ValueError(f"{place} {what}")


def message_of(raw: Any, number: int, where: str, roles: Sequence[Any]) -> Message:
    """The message `number` (from 1) of a chat whose roles are `roles`. Raises ValueError, which names all of these."""
    place = f"{where}: message {number} of the roles {', '.join(map(str, roles))}"
    if not isinstance(raw, dict):
        raise ValueError(
            f"{where}: a chat must be a non-empty list of objects with role and content, but message {number} is"
            f" {type(raw).__name__}"
        )
    fields = {key: value for key, value in raw.items() if value is not None}  # tables fill absent fields with null
    if "role" not in fields and "from" in fields:
        fields = _from_value(fields)
    role = fields.get("role")
    if not isinstance(role, str) or not role:
        refuse(place, f"has no role; its fields are {', '.join(map(repr, raw)) or 'none'}")
    if role == CALL:
        fields, role = _called(fields, place), "assistant"
    fields["role"] = ROLES.get(role.lower(), role)
    learned = _learned(fields, place) and fields["role"] == "assistant"
    if "tool_calls" in fields:
        fields["tool_calls"] = _calls(fields["tool_calls"], place)
    fields["content"] = _content(fields, place)
    return Message(fields if fields.get("tool_calls") else {k: v for k, v in fields.items() if k != "tool_calls"}, learned)


def _from_value(fields: dict[str, Any]) -> dict[str, Any]:
    names = {"from": "role", "value": "content"}
    return {names.get(key, key): value for key, value in fields.items()}


def _learned(fields: dict[str, Any], place: str) -> bool:
    """Takes `weight` and `train` out: they are for training, not for the template."""
    values = {name: fields.pop(name) for name in ("weight", "train") if name in fields}
    for name, value in values.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            refuse(place, f"has {name} {value!r}; allowed are 0 and 1")
    return all(values.values())


def _content(fields: dict[str, Any], place: str) -> str:
    content = fields.get("content")
    if content is None and fields.get("tool_calls"):
        return ""  # a template may add it to other text; "" is what none of them shows
    if content is None:
        refuse(place, f"has no content; its fields are {', '.join(map(repr, fields))}")
    if isinstance(content, list):
        return "".join(_part(part, place) for part in content)
    if not isinstance(content, str):
        refuse(place, f"has a content of {type(content).__name__}, not text")
    return str(content)


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    kind = part.get("type", "none") if isinstance(part, dict) else type(part).__name__
    refuse(place, f"has a part of type {kind}; only text is trained here")


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects: templates write them as JSON, and would write a text's quotes too."""
    calls = _decoded(calls)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        refuse(place, "has tool_calls that are no list of objects")
    return [_call(call) for call in calls]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    arguments = _decoded(call.get("arguments"))
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _called(fields: dict[str, Any], place: str) -> dict[str, Any]:
    call = _decoded(fields.get("content"))
    if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
        refuse(place, f"is a {CALL}, which must be JSON with name and arguments")
    rest = {key: value for key, value in fields.items() if key not in ("role", "content")}
    return {**rest, "role": "assistant", "tool_calls": [{"type": "function", "function": call}]}


def _decoded(value: Any) -> Any:
    """JSON text as what it says; everything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
