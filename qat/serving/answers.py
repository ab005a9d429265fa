"""One answer made of a stream: what the protocol has for clients that do not ask for a stream."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import Any


class Collected:
    """Takes an ASGI response of server-sent events, each a chunk of the protocol, and gives the whole."""

    def __init__(self, chat: bool) -> None:
        self.chat = chat
        self.status = 0
        self.data = bytearray()
        self.whole = False

    async def take(self, message: MutableMapping[str, Any]) -> None:
        """A message that the server sends."""
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
        elif message["type"] == "http.response.body":
            self.data += message.get("body", b"")
            self.whole = not message.get("more_body")

    @property
    def gone(self) -> bool:
        """Whether the server stopped before the end, as it does for a client that left."""
        return not self.whole

    def answer(self) -> tuple[int, dict[str, Any]]:
        """Status and content; an error of the server as it said it."""
        if self.status != 200:
            return self.status, _error(self.data.decode(errors="replace"))
        events = [event for event in self.data.decode().split("\n\n") if event.startswith("data: ")]
        try:
            chunks = [json.loads(event.removeprefix("data: ")) for event in events if event != "data: [DONE]"]
        except ValueError:  # transformers writes an error of the model's without escaping it
            return 500, _error(events[-1])
        if failed := next((chunk for chunk in chunks if "error" in chunk), None):
            return 500, _error(str(failed["error"]))
        return 200, self._joined(chunks)

    def _joined(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        last = chunks[-1]
        choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
        end = {
            "index": 0,
            "finish_reason": next((c["finish_reason"] for c in reversed(choices) if c.get("finish_reason")), "stop"),
        }
        about = {"id": last["id"], "created": last["created"], "model": last["model"], "usage": last.get("usage")}
        if not self.chat:
            text = "".join(choice.get("text") or "" for choice in choices)
            return {**about, "object": "text_completion", "choices": [{**end, "text": text, "logprobs": None}]}
        return {**about, "object": "chat.completion", "choices": [{**end, "message": _message([c["delta"] for c in choices])}]}


def _message(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(delta.get("content") or "" for delta in deltas)}
    if reasoning := "".join(delta.get("reasoning_content") or "" for delta in deltas):
        message["reasoning_content"] = reasoning
    if calls := [call for delta in deltas for call in delta.get("tool_calls") or ()]:
        message["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in calls]
    return message


def _error(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
        text = str(found.get("detail", found.get("error", text)))
    except (ValueError, AttributeError):
        pass
    return {"error": {"message": " ".join(text.split())[:400], "type": "server_error"}}
