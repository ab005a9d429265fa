"""Chat templates, run in a process of their own: a template is a program that came with a model.

transformers' sandbox keeps it from files and objects, and from `range` of more than 100,000; it does not bound time or memory:
two nested ranges, `'a' * 10**10` or `9**(9**9)` stop a run for hours or take the machine's memory. A thread or a signal cannot
end the last of these, which is one instruction to Python; a process can be killed. It is forked, since a fresh one would import
transformers for seconds, and it only ever runs jinja.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qat.data.records import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SECONDS = 10.0
"""For all renderings of one chat."""
CHARACTERS = 1 << 24
"""Of one chat, all its renderings together."""
MEMORY = 1 << 30
"""Bytes beyond those that the process starts with."""


class TemplateStopped(ValueError):
    """A template that was ended: it would do the same with the next chat."""


@dataclass(frozen=True)
class Request:
    """What a template is given; `template` None is the tokenizer's own. `prompt`: end with the header of the answer to come."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    prompt: bool = False
    template: str | None = None


@dataclass(frozen=True)
class Rendered:
    """A text, or the reason why there is none."""

    text: str = ""
    error: str | None = None


class Renderer:
    """A tokenizer's chat template behind a process, which begins with the first call. Use it as a context manager."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seconds: float | None = None) -> None:
        self.tokenizer, self.seconds = tokenizer, SECONDS if seconds is None else seconds
        self._running: tuple[Any, Connection] | None = None

    def __call__(self, requests: list[Request]) -> list[Rendered]:
        """Render one chat in several ways. Raises TemplateStopped where that takes too long, or ends the process."""
        process, pipe = self._running = self._running or _started(self.tokenizer)
        try:
            pipe.send(requests)
            if not pipe.poll(self.seconds):
                self._kill()
                raise TemplateStopped(f"the chat template takes more than {self.seconds:g} s for one chat")
            found: list[Rendered] = pipe.recv()
            return found
        except (EOFError, OSError) as error:
            process.join(1)
            self._kill()
            raise TemplateStopped(f"the chat template ended its process (exit code {process.exitcode})") from error

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._kill()

    def _kill(self) -> None:
        if self._running is not None:
            process, pipe = self._running
            pipe.close()
            process.kill()
            process.join()
            self._running = None


def _started(tokenizer: PreTrainedTokenizerFast) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, ours, tokenizer), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(pipe: Connection, parents: Connection, tokenizer: PreTrainedTokenizerFast) -> None:
    """Answer until the parent closes its end, or dies: its end must not stay open in here."""
    parents.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the parent, which kills this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _limit_memory()
    while True:
        try:
            pipe.send(_answers(pipe.recv(), tokenizer))
        except (EOFError, OSError):
            return


def _limit_memory() -> None:
    sizes = Path("/proc/self/statm")
    if sizes.exists():
        most = int(sizes.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MEMORY
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _answers(requests: list[Request], tokenizer: Any) -> list[Rendered]:
    found, left = [], CHARACTERS
    for request in requests:
        found.append(_render(request, tokenizer, left))
        left -= len(found[-1].text)
    return found


def _render(request: Request, tokenizer: Any, most: int) -> Rendered:
    try:
        text = tokenizer.apply_chat_template(
            request.messages,
            tools=request.tools,
            chat_template=request.template,
            tokenize=False,
            add_generation_prompt=request.prompt,
            **request.options,
        )
    except Exception as error:  # templates raise jinja's errors, of several classes, with text for people, and any of Python's
        return Rendered(error=one_line(error))
    if len(text) > most:
        return Rendered(error=f"it makes more than {CHARACTERS:,} characters of one chat")
    return Rendered(str(text))
