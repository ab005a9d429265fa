"""`python -m qat.serve`: transformers' server answers with the packed model's own words."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import decoders
from transformers import AutoModelForCausalLM, AutoTokenizer

import qat
from qat import serve
from qat.formats.packed import folder as packed

MISSING = [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}. {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}ai. {% endif %}"
ASK = [{"role": "user", "content": "the cat"}]
ROOT = Path(qat.__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A format that only our quantizer reads: channel scales in base 3."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = 1
    qat.convert(model, qat.QuantConfig(granularity="channel"))
    qat.pack(model, layout="base3")
    return packed.save(model, tmp_path_factory.mktemp("served") / "x", tokenizer=tokenizer)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


KEY = {"Authorization": "Bearer sesame"}


class Client:
    """Asks a server that runs."""

    def __init__(self, port: int, folder: Path) -> None:
        self.port, self.folder = port, folder

    def ask(self, body: Any, path: str = "/v1/chat/completions", headers: Any = KEY, method: str = "POST") -> tuple[int, Any]:
        """Status and JSON; `body`: bytes go as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("localhost", self.port, timeout=60)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text.startswith(b"{") else text
        finally:
            connection.close()

    def leave(self, body: Any) -> None:
        """Ask, and hang up."""
        data = json.dumps(body).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Authorization: Bearer sesame", f"Content-Length: {len(data)}"]
        head = "\r\n".join([*lines, "", ""])
        with socket.create_connection(("localhost", self.port), timeout=10) as connection:
            connection.sendall(head.encode() + data)
            time.sleep(0.2)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    """Of a server with a key in its environment, on the loopback interface."""
    if MISSING:
        pytest.skip(f"the extra `serve` is not installed: no {', '.join(MISSING)}")
    port = free_port()
    command = [sys.executable, "-m", "qat.serve", str(folder), "--port", str(port), "--device", "cpu", "--max-waiting", "9"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "QAT_API_KEY": "sesame"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(f"http://localhost:{port}", server)
        yield Client(port, folder)
    finally:
        server.send_signal(signal.SIGINT)
        printed = server.communicate(timeout=60)[0]
    assert f'the model\'s name for clients is "{folder}"' in printed


def wait_for(url: str, server: subprocess.Popen[str]) -> None:
    for _ in range(600):
        assert server.poll() is None, server.communicate()[1]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError("the server did not come up")


def test_chat_completions_are_the_model_s_own(client: Client) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(client.folder), packed.load(client.folder)
    prompt = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=9, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    expected = tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(expected) > 3
    for stream in (False, True):
        body = {"model": str(client.folder), "messages": ASK, "max_tokens": 9, "temperature": 0, "stream": stream}
        status, answer = client.ask(body)
        assert status == 200
        if stream:
            chunks = [json.loads(line[6:]) for line in answer.decode().splitlines() if line.startswith("data: {")]
            assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == expected
            assert chunks[-1]["usage"]["completion_tokens"] == 9
        else:
            assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
            assert answer["usage"]["prompt_tokens"] == prompt["input_ids"].shape[1]


def test_a_temperature_samples_and_a_seed_repeats(client: Client) -> None:
    def text(**more: Any) -> str:
        return client.ask({"prompt": "the cat", "max_tokens": 12, **more}, "/v1/completions")[1]["choices"][0]["text"]

    assert text(temperature=1.5, seed=1) == text(temperature=1.5, seed=1) != text(temperature=1.5, seed=2)
    assert text(temperature=0) == text(temperature=0, seed=5) == text()


@pytest.mark.parametrize("stream", [False, True])
def test_answers_end_with_the_context(client: Client, stream: bool) -> None:
    start = time.perf_counter()
    status, answer = client.ask({"prompt": "the cat sat", "max_tokens": 10**6, "stream": stream}, "/v1/completions")
    assert status == 200 and time.perf_counter() - start < 20
    if not stream:
        assert answer["usage"]["total_tokens"] <= 64
    status, answer = client.ask({"prompt": "the cat " * 40}, "/v1/completions")
    assert status == 400 and "320 tokens, but the model's context is 64" in answer["error"]["message"]


def test_odd_requests_get_an_answer_and_never_500(client: Client) -> None:
    good: dict[str, Any] = {"messages": ASK, "max_tokens": 2}
    odd: list[tuple[Any, set[int]]] = [
        (b"", {400}),
        (b"{", {400}),
        (b"\xff\xfe", {400}),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", {400}),
        ({**good, "temperature": 1e-40}, {400}),
        (json.dumps({**good, "temperature": float("nan")}).encode(), {400}),
        ({**good, "model": "gpt"}, {404}),
        ({**good, "max_tokens": -5}, {400}),
        ({**good, "max_tokens": 2**31 - 1}, {200}),
        ({**good, "n": 3}, {400}),
        ({**good, "stop": ["a", "e"]}, {200}),
        ({**good, "stop": [""]}, {400}),
        ({**good, "messages": [{"role": "user", "content": "\u65e5\u672c \U0001f600 \x00"}]}, {200}),
        ({**good, "messages": [{"role": "user", "content": ""}]}, {200}),
        (b'{"messages": [{"role": "user", "content": "\\udc80"}]}', {400}),
        ({**good, "messages": [{"role": "user", "content": "a" * 10**6}]}, {400}),
        ({**good, "tools": [{"type": "function", "function": {"name": "f"}}]}, {200}),
        ({**good, "generation_config": '{"num_beams": 1000}'}, {400}),
        ({"prompt": "a"}, {400}),
    ]
    for body, expected in odd:
        status, answer = client.ask(body)
        assert status in expected, (str(body)[:100], status, answer)
    assert client.ask(b" " * (5 << 20))[0] == 413
    for path in ("/reset", "/load_model", "/v1/responses"):
        assert client.ask({"model": "x"}, path)[0] == 404
    assert client.ask(good, headers={})[0] == 401
    assert client.ask(good)[0] == 200


def test_load_and_clients_that_leave(client: Client) -> None:
    body = {"messages": ASK, "max_tokens": 40}
    with ThreadPoolExecutor(30) as pool:
        found = [status for status, _ in pool.map(lambda _: client.ask(body), range(30))]
    assert set(found) <= {200, 429} and found.count(200) >= 10
    for stream in (False, True):
        client.leave({**body, "stream": stream})
    start = time.perf_counter()
    assert client.ask({**body, "max_tokens": 1})[0] == 200 and time.perf_counter() - start < 10


def test_a_model_without_a_chat_template_says_so(folder: Path) -> None:
    from qat.serving.requests import Refused, check
    from qat.serving.server import count_tokens

    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = check({"messages": ASK}, True, "m")
    assert count_tokens(tokenizer, asked, {}) > 5
    for template, message in ((None, "no chat template"), ("{{ raise_exception('no users') }}", "no users")):
        tokenizer.chat_template = template
        with pytest.raises(Refused, match=message) as refused:
            count_tokens(tokenizer, asked, {})
        assert refused.value.status == 400


def test_errors_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert serve.main([str(tmp_path)]) == 2
    assert "neither the folder of a finished run" in capsys.readouterr().err
    for option in (["--max-waiting", "-1"], ["--api-key", "a b"], ["--api-key", ""]):
        assert serve.main([str(folder), *option]) == 2
        assert f"qat.serve: {option[0]}" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options in (["--port", port], [f"--port={port}", "--host", "127.0.0.1"], ["--port", "70000"]):
            assert serve.main([str(folder), *options]) == 2
            said = capsys.readouterr().err
            assert said.startswith(("qat.serve: port ", "qat.serve: --port 70000 is")) and said.count("\n") == 1
    monkeypatch.setattr("qat.serving.server.find_spec", lambda name: None)
    assert serve.main([str(folder)]) == 2
    assert capsys.readouterr().err == "qat.serve: serving needs the package fastapi: pip install -e .[serve]\n"
