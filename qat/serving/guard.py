"""The guard in front of transformers' server, as an ASGI application: who may ask, what, how much at once, and until when.

transformers' server answers whoever comes, loads and unloads models for them, and goes on generating for clients that have left
unless they asked for a stream. So the guard lets through two questions and two looks, each request in its turn, and asks the
server for a stream even where the client wants one answer: a stream stops when its client is gone.

One request at a time, as transformers' own generation thread has it, also makes a seed mean what it says: with two at once each
would draw from the other's random numbers. With continuous batching many run at once, and none can have its own sampling.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from qat.serving.answers import Collected
from qat.serving.requests import MOST_BYTES, Asked, Refused, check, parse, room

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_CHAT = "/v1/chat/completions"
_ROUTES = {_CHAT: "POST", "/v1/completions": "POST", "/v1/models": "GET", "/health": "GET"}
_BODY_SECONDS = 30.0


@dataclass
class Served:
    """What the guard must know of the model."""

    name: str
    context: int
    """Tokens, prompt and answer together."""
    default_tokens: int
    """Of an answer where a request does not say."""
    encode: Callable[[Asked], int]
    """The number of a prompt's tokens; `Refused` where it has no form that the model knows."""
    generation: Callable[[Asked, int], dict[str, Any]]
    """Fields for the server's body that make it sample as was asked, for so many tokens."""


class Guard:
    """See the module. `at_once` requests run, `waiting` more wait, and the next is told to come back (429)."""

    def __init__(self, app: App, served: Served, *, key: str | None = None, at_once: int = 1, waiting: int = 16) -> None:
        self.app, self.served, self.key = app, served, key
        self.most = at_once + waiting
        self.inside = 0
        self.turn = asyncio.Semaphore(at_once)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return
        try:
            await self._http(scope, receive, send)
        except Refused as refused:
            await _answer(send, refused.status, {"error": {"message": str(refused), "type": "invalid_request_error"}})

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        method = _ROUTES.get(scope["path"])
        if method is None:
            raise Refused(404, f"{scope['path'][:200]} is not served; there are {', '.join(_ROUTES)}")
        if scope["path"] != "/health":
            self._authorize(scope)
        if scope["method"] != method:
            raise Refused(405, f"{scope['path']} takes {method}")
        if scope["path"] == "/v1/models":
            model = {"id": self.served.name, "object": "model", "created": 0, "owned_by": "qat"}
            return await _answer(send, 200, {"object": "list", "data": [model]})
        if scope["path"] == "/health":
            return await self.app(scope, receive, send)
        await self._generate(scope, receive, send)

    def _authorize(self, scope: Message) -> None:
        if self.key is None:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self.key.encode()):
            raise Refused(401, "this server needs a key, as the header Authorization: Bearer KEY")

    async def _generate(self, scope: Message, receive: Receive, send: Send) -> None:
        chat = scope["path"] == _CHAT
        body = parse(await _read(receive))
        asked = check(body, chat, self.served.name)
        async with self._place(receive) as there:
            if not there:
                return
            prompt = await asyncio.to_thread(self.served.encode, asked)
            count = room(prompt, asked.max_tokens, self.served.context, self.served.default_tokens)
            inner = {"model": self.served.name, "stream": True, **self.served.generation(asked, count)}
            inner |= {"messages" if chat else "prompt": asked.prompt, **({"tools": asked.tools} if asked.tools else {})}
            await self._forward(scope, inner, asked.stream, chat, receive, send)

    @asynccontextmanager
    async def _place(self, receive: Receive) -> AsyncIterator[bool]:
        """Wait for a turn; False where the client left meanwhile."""
        if self.inside >= self.most:
            raise Refused(429, f"{self.inside} requests are running or waiting, which is the most; try again later")
        self.inside += 1
        mine = False
        try:
            mine = await self._turn(receive)
            yield mine
        finally:
            self.inside -= 1
            if mine:
                self.turn.release()

    async def _turn(self, receive: Receive) -> bool:
        turn, left = asyncio.ensure_future(self.turn.acquire()), asyncio.ensure_future(receive())
        mine = False
        try:
            await asyncio.wait({turn, left}, return_when=asyncio.FIRST_COMPLETED)
            mine = turn.done() and not left.done()
            return mine
        finally:
            left.cancel()
            if turn.done() and not mine:
                self.turn.release()
            elif not mine:
                turn.cancel()

    async def _forward(
        self, scope: Message, body: dict[str, Any], stream: bool, chat: bool, receive: Receive, send: Send
    ) -> None:
        data = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        inner = {**scope, "headers": headers, "query_string": b""}
        if stream:
            return await self.app(inner, _replayed(data, receive), send)
        collected = Collected(chat)
        await self.app(inner, _replayed(data, receive), collected.take)
        if not collected.gone:
            await _answer(send, *collected.answer())


def _replayed(data: bytes, receive: Receive) -> Receive:
    """First the body, then what the client does next: it can only leave."""
    first: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]

    async def next_message() -> Message:
        return first.pop() if first else await receive()

    return next_message


async def _read(receive: Receive) -> bytes:
    """A request's body; Refused where it is too long or too slow."""
    try:
        return await asyncio.wait_for(_read_all(receive), _BODY_SECONDS)
    except TimeoutError as error:
        raise Refused(408, f"the body did not come within {_BODY_SECONDS:g} seconds") from error


async def _read_all(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the client left before its request was whole")
        body += message.get("body", b"")
        if len(body) > MOST_BYTES:
            raise Refused(413, f"the body is above {MOST_BYTES} bytes")
        if not message.get("more_body"):
            return body


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    data = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    if status == 429:
        headers.append((b"retry-after", b"1"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
