"""What a request of OpenAI's protocol may ask, checked before a model sees it: every wrong value is told with what is allowed.

transformers' handlers take values as they come: a temperature of NaN is an error inside the model, one that is above zero is
ignored where the model's own default is not to sample, more tokens than the model has positions give garbage for minutes, and a
field that they do not know at all is accepted or ignored. So only fields that do what they say get through.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

MOST_BYTES = 4 << 20
_MOST_STOPS, _LONGEST_STOP, _MOST_MESSAGES = 4, 64, 1024
_LEAST_TEMPERATURE = 1e-3
_ROLES = ("system", "developer", "user", "assistant", "tool")


class Refused(Exception):
    """A request that is not served: HTTP `status` and one line of why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def _refuse(reason: str) -> NoReturn:
    raise Refused(400, reason)


@dataclass
class Asked:
    """A request whose every field was checked."""

    prompt: str | list[dict[str, Any]]
    """A text to continue, or messages for the chat template."""
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: list[str]
    stream: bool
    tools: list[dict[str, Any]] | None


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=lambda name: _refuse(f"{name} is no number of JSON"))
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except RecursionError:
        _refuse("the body is nested too deeply")
    except ValueError as error:
        _refuse(f"the body is not JSON in UTF-8: {' '.join(str(error).split())[:200]}")
    if not isinstance(found, dict):
        _refuse(f"the body must be a JSON object, not {type(found).__name__}")
    return found


def check(body: Mapping[str, Any], chat: bool, name: str) -> Asked:
    """Every field of a body of /v1/chat/completions or /v1/completions.

    Args:
        name: of the served model; another one is refused.

    Raises:
        Refused: 404 for another model, otherwise 400.
    """
    given = {key: value for key, value in body.items() if value is not None}
    known = {**_SAMPLING, **_WITHOUT_EFFECT, **(_CHAT if chat else _TEXT)}
    for key in given:
        if key not in known:
            _refuse(f"the field {key[:80]!r} is not known; allowed are {', '.join(sorted(known))}")
    if given.get("model", name) not in (name, f"{name}@main"):  # what transformers calls it in its answers
        raise Refused(404, f"the model {str(given['model'])[:200]!r} is not served here, only {name!r}")
    checked = {key: known[key](key, value) for key, value in given.items()}
    wanted = "messages" if chat else "prompt"
    if wanted not in checked:
        _refuse(f"{wanted} is missing")
    return Asked(
        prompt=checked[wanted],
        max_tokens=checked.get("max_completion_tokens", checked.get("max_tokens")),
        temperature=checked.get("temperature"),
        top_p=checked.get("top_p"),
        seed=checked.get("seed"),
        stop=checked.get("stop", []),
        stream=checked.get("stream", False),
        tools=checked.get("tools"),
    )


def room(prompt: int, asked: int | None, context: int, default: int) -> int:
    """How many tokens may be generated after a prompt of so many; what was asked for is cut to the context.

    Raises:
        Refused: the prompt alone fills the context, or has no tokens.
    """
    if prompt < 1:
        _refuse("the prompt has no tokens; give at least one")
    if prompt >= context:
        _refuse(f"the prompt has {prompt} tokens, but the model's context is {context}; shorten it")
    return min(default if asked is None else asked, context - prompt)


def _whole(least: int, most: int) -> Callable[[str, Any], int]:
    def check(key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            _refuse(f"{key}={_shown(value)} is not allowed; it must be a whole number from {least} to {most}")
        return value

    return check


def _number(allowed: str, inside: Callable[[float], bool]) -> Callable[[str, Any], float]:
    def check(key: str, value: Any) -> float:
        number = not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < 1e9
        if not number or not math.isfinite(value) or not inside(float(value)):
            _refuse(f"{key}={_shown(value)} is not allowed; it must be {allowed}")
        return float(value)

    return check


def _only(*allowed: Any) -> Callable[[str, Any], Any]:
    """Values that mean: without it. Lists and objects are compared as they are."""

    def check(key: str, value: Any) -> Any:
        if not any(value == one and type(value) is type(one) for one in allowed):
            _refuse(f"{key}={_shown(value)} is not supported here; allowed is {', '.join(map(json.dumps, allowed))}")
        return value

    return check


def _kind(kind: type, words: str) -> Callable[[str, Any], Any]:
    def check(key: str, value: Any) -> Any:
        if not isinstance(value, kind):
            _refuse(f"{key}={_shown(value)} is not allowed; it must be {words}")
        return value

    return check


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        _refuse(f"{key} must be a string that is not empty, not {_shown(value)}")
    return value


def _stop(key: str, value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    fits = isinstance(stops, list) and len(stops) <= _MOST_STOPS
    if not fits or not all(isinstance(one, str) and 0 < len(one) <= _LONGEST_STOP for one in stops):
        _refuse(f"{key} must be a string or up to {_MOST_STOPS}, each of 1 to {_LONGEST_STOP} characters, not {_shown(value)}")
    return stops


def _messages(key: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not 1 <= len(value) <= _MOST_MESSAGES:
        _refuse(f"{key} must be a list of 1 to {_MOST_MESSAGES} messages, not {_shown(value)}")
    return [_message(f"{key}[{i}]", message) for i, message in enumerate(value)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        _refuse(f"{where} must be an object with role and content, not {_shown(message)}")
    if unknown := sorted(message.keys() - {"role", "content", "name"}):
        _refuse(f"{where}: the field {unknown[0][:80]!r} is not supported here; allowed are role, content, name")
    if message.get("role") not in _ROLES:
        _refuse(f"{where}: role={_shown(message.get('role'))} is not allowed; choose one of {', '.join(_ROLES)}")
    return {"role": message["role"], "content": _content(where, message.get("content"))}


def _content(where: str, content: Any) -> str:
    """Text, also in parts, as the protocol has it."""
    if isinstance(content, list):
        if not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
        ):
            _refuse(f'{where}: each part of content must be {{"type": "text", "text": STRING}}; this is a model of text')
        return " ".join(part["text"] for part in content)
    if not isinstance(content, str):
        _refuse(f"{where}: content must be a string, not {_shown(content)}")
    return content


def _tools(key: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) and isinstance(one.get("function"), dict) for one in value):
        _refuse(f"{key} must be a list of objects with a function, not {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | float | bool | None) else type(value).__name__
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**12 else text
    return text if len(text) <= 60 else text[:57] + "..."


_SAMPLING: dict[str, Callable[[str, Any], Any]] = {
    "model": _text,
    "max_tokens": _whole(1, 2**31 - 1),
    "temperature": _number(
        f"0 (the likeliest token) or from {_LEAST_TEMPERATURE} to 2", lambda t: t == 0 or _LEAST_TEMPERATURE <= t <= 2
    ),
    "top_p": _number("above 0 and at most 1", lambda p: 0 < p <= 1),
    "seed": _whole(0, 2**63 - 1),
    "stop": _stop,
    "stream": _kind(bool, "true or false"),
    "stream_options": _kind(dict, "an object"),
    "n": _only(1),
    "presence_penalty": _only(0, 0.0),
    "frequency_penalty": _only(0, 0.0),
    "logit_bias": _only({}),
}
_WITHOUT_EFFECT: dict[str, Callable[[str, Any], Any]] = {
    "user": _kind(str, "a string"),
    "metadata": _kind(dict, "an object"),
    "store": _kind(bool, "true or false"),
    "service_tier": _kind(str, "a string"),
}
_CHAT: dict[str, Callable[[str, Any], Any]] = {
    "messages": _messages,
    "max_completion_tokens": _whole(1, 2**31 - 1),
    "tools": _tools,
    "tool_choice": _only("auto"),
    "logprobs": _only(False),
    "response_format": _only({"type": "text"}),
}
_TEXT: dict[str, Callable[[str, Any], Any]] = {"prompt": _text, "best_of": _only(1), "echo": _only(False)}
