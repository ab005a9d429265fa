"""`python -m qat.serve`: transformers' server answers with the packed model's own words."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
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


def post(url: str, body: dict[str, object]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def wait_for(url: str, server: subprocess.Popen[str]) -> None:
    for _ in range(600):
        assert server.poll() is None, server.communicate()[1]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError("the server did not come up")


@pytest.mark.skipif(bool(MISSING), reason=f"the extra `serve` is not installed: no {', '.join(MISSING)}")
def test_chat_completions_are_the_model_s_own(folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), packed.load(folder)
    prompt = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=9, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    expected = tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(expected) > 3
    port = free_port()
    command = [sys.executable, "-m", "qat.serve", str(folder), "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(f"http://localhost:{port}", server)
        body = {"model": str(folder), "messages": ASK, "max_tokens": 9, "temperature": 0}
        answer = post(f"http://localhost:{port}/v1/chat/completions", body)
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
        assert answer["usage"]["prompt_tokens"] == prompt["input_ids"].shape[1]
    finally:
        server.send_signal(signal.SIGINT)
        printed = server.communicate(timeout=60)[0]
    assert f'the model\'s name for clients is "{folder}"' in printed


def test_errors_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert serve.main([str(tmp_path)]) == 2
    assert "neither the folder of a finished run" in capsys.readouterr().err
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert serve.main([str(folder)]) == 2
    assert capsys.readouterr().err == "qat.serve: serving needs the package fastapi: pip install -e .[serve]\n"
