"""From the records that people have to chats: what has one reading is read, what has several is named and refused.

Read are `messages` (or `data.messages_field`) of {role, content}, ShareGPT's `conversations` of {from, value}, `prompt` with
`completion` (texts or messages; only the completion is learned), and `instruction` with `output`. A column may hold its list as
JSON text. `tools`, `system`, `chat_template_kwargs` and `weight` beside them, and `weight` or `train` of a message, mean what
they mean elsewhere. Not read are `instruction` with an `input`, which everybody joins otherwise, and pairs of preference.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qat.data.chat.messages import Message, message_of

SHAPES = "messages, conversations, prompt with completion, or instruction with output"
_BESIDE = ("tools", "system", "chat_template_kwargs", "weight")


@dataclass
class Chat:
    """Messages for a template, and which of them are learned."""

    messages: list[dict[str, Any]]
    learned: list[bool]
    """For each message: said by the assistant, and to be learned."""
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Further variables for the template (`chat_template_kwargs`)."""
    unused: tuple[str, ...] = ()
    """Columns that were not read."""

    @property
    def roles(self) -> str:
        """For messages to people."""
        return ", ".join(str(message["role"]) for message in self.messages)


@dataclass(frozen=True)
class Form:
    """A way to write a chat: the columns that it needs, and how they become messages."""

    columns: tuple[str, ...]
    read: Callable[[dict[str, Any], str, str], list[Message]]
    """(record, column or columns for messages, where) -> messages"""


def chat_of(record: dict[str, Any], where: str, column: str = "messages") -> Chat:
    """The chat of a record. Raises ValueError for what cannot be read or could be read in several ways; it says why."""
    record = {name: value for name, value in record.items() if value is not None}  # tables fill absent fields with null
    form = _form(record, where, column)
    messages = _with_system(form.read(record, form.columns[0], where), record.get("system"), where)
    chat = Chat([message.fields for message in messages], [message.learned for message in messages])
    if not any(message.fields["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: nothing in this chat is said by the assistant; its roles are {chat.roles}")
    if not _weight(record.get("weight", 1), where):
        chat.learned = [False] * len(messages)
    chat.tools = _objects(record.get("tools"), "tools", where)
    chat.options = _options(record.get("chat_template_kwargs"), where)
    chat.unused = tuple(name for name in record if name not in (*form.columns, *_BESIDE))
    return chat


def _form(record: dict[str, Any], where: str, column: str) -> Form:
    if column in record:
        return Form((column,), _messages)
    if column == "messages":
        for form in FORMS:
            if all(name in record for name in form.columns):
                return form
    names = ", ".join(map(repr, record)) or "none"
    why = "; pairs of preference (chosen, rejected) are not trained here" if "chosen" in record else ""
    raise ValueError(f"{where}: there is no field {column!r}; its fields are {names}; a chat is {SHAPES}{why}")


def _messages(record: dict[str, Any], column: str, where: str) -> list[Message]:
    found = _list(record[column], column, where)
    roles = [m.get("role", m.get("from", "none")) if isinstance(m, dict) else type(m).__name__ for m in found]
    return [message_of(message, i, where, roles) for i, message in enumerate(found, 1)]


def _list(value: Any, column: str, where: str) -> list[Any]:
    if isinstance(value, str):
        value = _json(value, column, where)
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else type(value).__name__
        raise ValueError(
            f"{where}: a chat must be a non-empty list of objects with role and content, but {column!r} holds {kind}"
        )
    return value


def _json(text: str, column: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {column!r} holds text that is not JSON: {text[:40]!r}") from error


def _prompt_completion(record: dict[str, Any], column: str, where: str) -> list[Message]:
    prompt, completion = _turns(record, "prompt", "user", where), _turns(record, "completion", "assistant", where)
    for message in prompt:
        message.learned = False
    if not any(message.fields["role"] == "assistant" for message in completion):
        raise ValueError(f"{where}: 'completion' holds no message of the assistant")
    return prompt + completion


def _turns(record: dict[str, Any], column: str, role: str, where: str) -> list[Message]:
    if not isinstance(record[column], str):
        return _messages(record, column, where)
    return [message_of({"role": role, "content": record[column]}, 1, where, [role])]


def _instruction(record: dict[str, Any], column: str, where: str) -> list[Message]:
    if record.get("input"):
        raise ValueError(
            f"{where}: 'instruction' with an 'input' has no one reading (how the two are joined differs); write it as messages"
        )
    turns = {"user": record["instruction"], "assistant": record["output"]}
    return [message_of({"role": role, "content": text}, i, where, list(turns)) for i, (role, text) in enumerate(turns.items(), 1)]


def _with_system(messages: list[Message], system: Any, where: str) -> list[Message]:
    if not system:
        return messages
    if any(message.fields["role"] == "system" for message in messages):
        raise ValueError(f"{where}: there is a system message and a column 'system' too; keep one of them")
    return [message_of({"role": "system", "content": system}, 0, where, ["system"]), *messages]


def _weight(value: Any, where: str) -> bool:
    if value not in (0, 1):
        raise ValueError(f"{where}: the column 'weight' is {value!r}; allowed are 0 and 1: chats are not weighted otherwise")
    return bool(value)


def _objects(value: Any, column: str, where: str) -> list[dict[str, Any]] | None:
    """A list of objects, or its JSON text."""
    if isinstance(value, str) and value.strip():
        value = _json(value, column, where)
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{where}: {column!r} must be a list of objects, or such a list as JSON text")
    return value


def _options(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = _json(value, "chat_template_kwargs", where)
    if not isinstance(value or {}, dict):
        raise ValueError(f"{where}: 'chat_template_kwargs' must be an object")
    taken = {"tools", "messages", "conversation", "chat_template", "tokenize", "add_generation_prompt"} & set(value or {})
    if taken:
        raise ValueError(f"{where}: 'chat_template_kwargs' must not set {', '.join(sorted(taken))}")
    return dict(value or {})


FORMS = (
    Form(("conversations",), _messages),
    Form(("conversation",), _messages),
    Form(("prompt", "completion"), _prompt_completion),
    Form(("instruction", "output"), _instruction),
)
"""Beside the configured column; the first whose columns are all there is taken."""
