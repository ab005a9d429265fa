"""The guard in front of a server that only pretends: who may ask, in turn, how many, and until when."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from qat.serving import guard as module
from qat.serving.guard import Guard, Served

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


class Server:
    """Sends a word every few milliseconds, and notes what became of each request."""

    def __init__(self, words: int = 3) -> None:
        self.words, self.bodies, self.running, self.most, self.cancelled = words, [], 0, 0, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append(json.loads((await receive())["body"]))
        self.running += 1
        self.most = max(self.most, self.running)
        left = asyncio.ensure_future(receive())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for i in range(self.words):
                await asyncio.sleep(0.005)
                if left.done():
                    self.cancelled += 1
                    return
                chunk = {"id": "1", "created": 1, "model": "m", "choices": [{"delta": {"content": f"w{i} "}, "text": f"w{i} "}]}
                await send({"type": "http.response.body", "body": f"data: {json.dumps(chunk)}\n\n".encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            left.cancel()
            self.running -= 1


def served(**changes: Any) -> Served:
    about = {
        "name": "m",
        "context": 64,
        "default_tokens": 20,
        "encode": lambda asked: 5,
        "generation": lambda asked, n: {"max_tokens": n},
    }
    return Served(**{**about, **changes})


async def ask(
    app: Any, body: Any, path: str = "/v1/chat/completions", *, method: str = "POST", leave: float | None = None, **headers: str
) -> tuple[int, Any]:
    """Status and answer; `leave`: seconds after which the client disconnects."""
    data, sent, first = body if isinstance(body, bytes) else json.dumps(body).encode(), [], [True]

    async def receive() -> dict[str, Any]:
        if first:
            first.pop()
            return {"type": "http.request", "body": data, "more_body": False}
        await asyncio.sleep(3600 if leave is None else leave)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await app({"type": "http", "path": path, "method": method, "headers": raw, "query_string": b""}, receive, send)
    content = b"".join(message.get("body", b"") for message in sent)
    return (sent[0]["status"], json.loads(content) if content.startswith(b"{") else content) if sent else (0, None)


def test_one_answer_is_made_of_a_stream() -> None:
    server = Server()
    status, found = asyncio.run(ask(Guard(server, served()), {**CHAT, "max_tokens": 500}))
    assert status == 200 and found["object"] == "chat.completion"
    assert found["choices"][0]["message"] == {"role": "assistant", "content": "w0 w1 w2 "}
    assert server.bodies == [{"model": "m", "stream": True, "max_tokens": 59, "messages": CHAT["messages"]}]
    status, found = asyncio.run(ask(Guard(server, served()), {"prompt": "a"}, "/v1/completions"))
    assert found["object"] == "text_completion" and found["choices"][0]["text"] == "w0 w1 w2 "
    assert server.bodies[1]["prompt"] == "a" and server.bodies[1]["max_tokens"] == 20


def test_a_stream_is_passed_on() -> None:
    status, found = asyncio.run(ask(Guard(Server(), served()), {**CHAT, "stream": True}))
    assert status == 200 and found.count(b"data: ") == 3


def test_only_two_questions_and_two_looks_are_served() -> None:
    guard = Guard(Server(), served())
    for path in ("/reset", "/load_model", "/v1/responses", "/v1/systemone", "/v1/audio/transcriptions", "/docs", "/"):
        assert asyncio.run(ask(guard, CHAT, path))[0] == 404
    assert asyncio.run(ask(guard, CHAT, method="GET"))[0] == 405
    status, found = asyncio.run(ask(guard, b"", "/v1/models", method="GET"))
    assert status == 200 and [one["id"] for one in found["data"]] == ["m"]


def test_a_key_is_asked_for() -> None:
    guard = Guard(Server(), served(), key="secret")
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Bearer s\u00e9cret"}):
        assert asyncio.run(ask(guard, CHAT, **given))[0] == 401
    assert asyncio.run(ask(guard, b"", "/v1/models", method="GET"))[0] == 401
    assert asyncio.run(ask(guard, CHAT, Authorization="Bearer secret"))[0] == 200


def test_thirty_at_once_are_answered_or_told_to_come_back() -> None:
    server = Server()
    guard = Guard(server, served(), waiting=9)

    async def all_of_them() -> list[int]:
        return [status for status, _ in await asyncio.gather(*(ask(guard, CHAT) for _ in range(30)))]

    found = asyncio.run(all_of_them())
    assert found.count(200) == 10 and found.count(429) == 20 and server.most == 1
    assert guard.inside == 0 and asyncio.run(ask(guard, CHAT))[0] == 200


def test_a_client_that_leaves_stops_its_generation_and_its_wait() -> None:
    server = Server(words=400)
    guard = Guard(server, served())

    async def two() -> list[tuple[int, Any]]:
        first = asyncio.ensure_future(ask(guard, CHAT, leave=0.05))
        await asyncio.sleep(0.01)
        second = asyncio.ensure_future(ask(guard, {**CHAT, "seed": 1}, leave=0.01))  # leaves while it waits
        return [await first, await second]

    assert asyncio.run(asyncio.wait_for(two(), 2)) == [(0, None), (0, None)]
    assert server.cancelled == 1 and len(server.bodies) == 1 and guard.inside == 0 and not guard.turn.locked()


def test_errors_of_the_server_are_passed_on() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'data: {"error": "it said "no""}\n\n'})

    status, found = asyncio.run(ask(Guard(broken, served()), CHAT))
    assert status == 500 and "it said" in found["error"]["message"]


def test_bodies_are_bounded_in_size_and_time(monkeypatch: Any) -> None:
    guard = Guard(Server(), served())
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    assert asyncio.run(ask(guard, b"x" * 1001))[0] == 413
    monkeypatch.setattr(module, "_BODY_SECONDS", 0.05)

    async def slow() -> list[Any]:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.01)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        await guard({"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}, receive, send)
        return sent

    assert asyncio.run(slow())[0]["status"] == 408
