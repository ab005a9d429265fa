"""transformers' server with our packed models, behind the guard.

`transformers serve` alone stops at our folders: it discovers no plug-ins, neither entry points nor a folder's own code name a
quantizer, and `--trust-remote-code` covers configs, models and tokenizers only. Its process has to import qat. It has no place
for a guard either, so the function that builds its application is wrapped while it starts.
"""

from __future__ import annotations

import copy
import errno
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from qat.formats.code import check_trust
from qat.formats.packed.folder import read_config
from qat.models.any import packed_folder
from qat.models.hub import context_length
from qat.serving.guard import Guard, Served
from qat.serving.requests import Asked, Refused

_NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")
_UNKNOWN_CONTEXT = 4096
_DEFAULT_TOKENS = 1024
_AT_ONCE = 64
"""Requests that continuous batching takes together."""


def serve(run: str, options: Sequence[str] = (), *, key: str | None = None, waiting: int = 16) -> None:
    """Serve the packed model of `run` until interrupted. Clients name it by the path that is printed, or not at all.

    Args:
        run: a run folder (its `packed/` is used) or a packed folder.
        options: of `transformers serve`, such as `["--port", "8080"]`.
        key: what clients must send as `Authorization: Bearer KEY`; None: nothing.
        waiting: how many requests may wait for their turn; further ones get the status 429.

    Raises:
        ValueError: `run` is no such folder, a package is missing, the folder cannot be loaded or brings code without trust,
            or the port is taken.
    """
    folder = packed_folder(run)
    if waiting < 0:
        raise ValueError(f"--max-waiting {waiting} is not allowed; it must be at least 0")
    if key is not None and (not key.isascii() or not key.isprintable() or " " in key or not key):
        raise ValueError("--api-key must be printable ASCII without blanks, and not empty")
    check_trust(folder, read_config(folder), "--trust-remote-code" in options)
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"serving needs the package {missing[0]}: pip install -e .[serve]")
    _check_port(options)
    import typer
    from transformers.cli.serve import Serve

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help="transformers serve, with qat's packed folders")(Serve)
    batching = "--continuous-batching" in options
    _warn_open(options, key)
    print(f'qat.serve: the model\'s name for clients is "{folder}"', flush=True)
    with _guarded(folder, batching, key, waiting):
        app([str(folder), *options], prog_name="python -m qat.serve")


@contextmanager
def _guarded(folder: Path, batching: bool, key: str | None, waiting: int) -> Iterator[None]:
    """While this lasts, transformers builds its application with the guard in front."""
    from starlette.middleware.cors import CORSMiddleware
    from transformers.cli.serving import server

    build = server.build_server

    def guarded(manager: Any, handler: Any, *more: Any, **named: Any) -> Any:
        cors = named.pop("enable_cors", False)
        app = build(manager, handler, *more, **named)
        served = describe(manager, handler, str(folder), batching)
        guard = Guard(app, served, key=key, at_once=_AT_ONCE if batching else 1, waiting=waiting)
        return CORSMiddleware(guard, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"]) if cors else guard

    server.build_server = guarded  # type: ignore[assignment]
    try:
        yield
    finally:
        server.build_server = build


def describe(manager: Any, handler: Any, name: str, batching: bool) -> Served:
    """What the guard must know, of transformers' model manager and chat handler; the model is loaded once."""
    model, processor = manager.load_model_and_processor(manager.process_model_name(name))
    tokenizer = getattr(processor, "tokenizer", processor)
    return Served(
        name=name,
        context=context_length(model) or _UNKNOWN_CONTEXT,
        default_tokens=max(_DEFAULT_TOKENS, model.generation_config.max_new_tokens or 0),
        encode=lambda asked: count_tokens(tokenizer, asked, handler.chat_template_kwargs),
        generation=_shared if batching else _own(model.generation_config),
    )


def count_tokens(tokenizer: Any, asked: Asked, template: dict[str, Any]) -> int:
    """The tokens of the prompt as the server will make them; Refused where the tokenizer's template cannot."""
    if isinstance(asked.prompt, str):
        return len(tokenizer(asked.prompt)["input_ids"])
    if not tokenizer.chat_template:
        raise Refused(400, "this model has no chat template; use /v1/completions with a prompt")
    try:
        found = tokenizer.apply_chat_template(
            asked.prompt, tools=asked.tools, add_generation_prompt=True, tokenize=True, return_dict=True, **template
        )
    except Exception as error:  # of jinja and of whatever the template's code does
        raise Refused(
            400, f"the model's chat template does not take these messages: {' '.join(str(error).split())[:300]}"
        ) from error
    return len(found["input_ids"])


def _own(defaults: Any) -> Callable[[Asked, int], dict[str, Any]]:
    """A generation config for each request: transformers does not sample where the model's default is the likeliest token."""

    def fields(asked: Asked, count: int) -> dict[str, Any]:
        config = copy.deepcopy(defaults)
        config.max_new_tokens, config.max_length = count, None
        if asked.temperature is not None or asked.top_p is not None:
            config.do_sample = asked.temperature != 0
        if config.do_sample:
            config.temperature = asked.temperature if asked.temperature is not None else (config.temperature or 1.0)
            config.top_p = asked.top_p if asked.top_p is not None else config.top_p
        seed = {} if asked.seed is None else {"seed": asked.seed}
        stop = {"stop": asked.stop} if asked.stop else {}
        return {"generation_config": config.to_json_string(use_diff=True), **seed, **stop, "max_tokens": count}

    return fields


def _shared(asked: Asked, count: int) -> dict[str, Any]:
    """Continuous batching has one way to sample for all requests."""
    for key in ("temperature", "top_p", "seed", "stop"):
        if getattr(asked, key) not in (None, []):
            raise Refused(400, f"{key} cannot be chosen with --continuous-batching, where all requests are sampled alike")
    return {"max_tokens": count}


def _given(options: Sequence[str], name: str, usual: str) -> str:
    """What an option of the server is, the last one counts."""
    words = " ".join(options).replace("=", " ").split()
    found = [value for option, value in pairwise(words) if option == name]
    return found[-1] if found else usual


def _check_port(options: Sequence[str]) -> None:
    """Before the model is loaded: uvicorn finds out behind it, in a log."""
    host, port = _given(options, "--host", "localhost"), _given(options, "--port", "8000")
    if not port.isdecimal():
        return  # which the server's own parser says
    if int(port) > 65_535:
        raise ValueError(f"--port {port} is not allowed; it must be in 0 to 65535")
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM):
            _bind(socket.socket(family, kind, protocol), address)
    except OSError as error:
        raise ValueError(f"port {port} of {host} cannot be had ({error.strerror}); choose another with --port") from None


def _bind(one: socket.socket, address: Any) -> None:
    """As uvicorn will; of an address that this machine has not, such as ::1, it does without."""
    with one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise


def _warn_open(options: Sequence[str], key: str | None) -> None:
    """Say that whoever reaches the machine may ask, where that is so."""
    host = _given(options, "--host", "localhost")
    if key is None and host not in ("localhost", "127.0.0.1", "::1"):
        print(f"qat.serve: {host} is open to whoever reaches it; --api-key asks clients for a key", file=sys.stderr)
