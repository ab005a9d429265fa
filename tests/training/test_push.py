"""A run on the hub: refused before anything is loaded, pushed in one commit with a card; the hub is a server of this test."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from qat.config import ExportConfig, TrainConfig
from qat.config.compose.saved import load_config
from qat.reporting.table import print_table
from qat.train import run

ME = {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}


class Hub:
    """Answers as the hub does, and keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []
        self.me: dict[str, Any] = ME
        self.refuses = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, None)

            def do_POST(self) -> None:
                hub.answer(self, self.rfile.read(int(self.headers["Content-Length"])))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler: Any, body: bytes | None) -> None:
        lines = [json.loads(line) for line in (body or b"").splitlines()]
        self.calls.append((handler.command, handler.path, lines))
        known = handler.headers["Authorization"] == "Bearer hf_secret"
        status, said = (200, self.said(handler.path, lines)) if known else (401, {})
        if self.refuses and handler.path.endswith("/commit/main"):
            status, said = 403, {"error": "no room"}
        data = json.dumps(said).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def said(self, path: str, lines: list[Any]) -> Any:
        if path == "/api/whoami-v2":
            return self.me
        if path == "/api/repos/create":
            return {"url": f"{self.address}/me/tiny"}
        if "/preupload/" in path:
            asked = [file["path"] for file in lines[0]["files"]]
            return {"files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in asked]}
        return {"commitUrl": f"{self.address}/me/tiny/commit/abc", "commitOid": "abc"}

    @property
    def paths(self) -> list[str]:
        return [path for _, path, _ in self.calls]

    def committed(self) -> dict[str, bytes]:
        (lines,) = (lines for _, path, lines in self.calls if path.endswith("/commit/main"))
        files = [line["value"] for line in lines if line["key"] == "file"]
        return {file["path"]: base64.b64decode(file["content"]) for file in files}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    config.trainer = replace(config.trainer, max_steps=2, monitor_every=None)
    config.export = ExportConfig(formats=[], push_to_hub="me/tiny", hub_private=True)
    return config


def test_one_commit_holds_what_was_written_and_a_card_that_the_hub_reads(config: TrainConfig, hub: Hub, capsys: Any) -> None:
    config.export = replace(config.export, formats=["hf"])
    result = run(config)
    folder, files = Path(result.folder), hub.committed()
    created = next(lines[0] for _, path, lines in hub.calls if path == "/api/repos/create")
    assert created["name"] == "tiny" and created["visibility"] == "private"
    assert result.hub["commit"] == "abc" and result.hub["files"] == len(files)
    for place, file in {"config.json": "model/config.json", "packed/model.safetensors": "packed/model.safetensors"}.items():
        assert files[place] == (folder / file).read_bytes()
    assert files["README.md"] == (folder / "README.md").read_bytes() != (folder / "model/README.md").read_bytes()
    card = ModelCard((folder / "README.md").read_text())
    (found,) = card.data.eval_results
    value = result.perplexity["exported"]
    assert (found.metric_type, found.metric_value, found.dataset_name) == ("perplexity", value, result.perplexity.text)
    assert card.data.model_name == "tiny" and card.data.pipeline_tag == "text-generation"
    assert 'from_pretrained("me/tiny")' in card.text and 'from_pretrained("me/tiny", subfolder="packed")' in card.text
    assert "- packed = trained to the bit (logits and perplexity)" in card.text
    own = ModelCard((folder / "model/README.md").read_text())  # the folder's own, which lies there whether it is pushed or not
    assert own.data.eval_results[0].metric_value == pytest.approx(value, abs=1e-4)
    print_table(result)
    assert f"pushed     {hub.address}/me/tiny" in capsys.readouterr().out


def test_without_a_stock_folder_ours_is_at_the_root(config: TrainConfig, hub: Hub) -> None:
    files = (run(config), hub.committed())[1]
    assert {"config.json", "model.safetensors", "README.md"} <= files.keys() and not [one for one in files if "/" in one]
    assert b"import qat" in files["README.md"] and b'from_pretrained("me/tiny")' in files["README.md"]


def test_a_card_is_written_where_nothing_is_pushed(config: TrainConfig) -> None:
    config.export = ExportConfig(formats=[])
    folder = Path(run(config).folder)
    card = ModelCard((folder / "README.md").read_text())
    assert card.data.model_name == "tiny" and 'from_pretrained("packed")' in card.text


@pytest.mark.parametrize(("case", "words"), [
    ("offline", r"needs the network, but HF_HUB_OFFLINE is set"),
    ("no token", r"needs a token that may write: `hf auth login`, or HF_TOKEN"),
    ("nobody there", r"the hub does not let us in: "),
    ("of another", r"the token is of you, who may write to you$"),
    ("reads", r"the token mine may only read; make one that may write"),
])  # fmt: skip
def test_it_is_refused_before_the_training(
    config: TrainConfig, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str, words: str
) -> None:
    if case == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if case == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    if case == "nobody there":
        hub.server.shutdown()
        hub.server.server_close()
    hub.me = {"of another": {"name": "you", "orgs": []}, "reads": {
        **ME, "auth": {"accessToken": {"role": "read", "displayName": "mine"}},
    }}.get(case, ME)  # fmt: skip
    with pytest.raises(ValueError, match=words) as error:
        run(config)
    assert "\n" not in str(error.value) and "hf_secret" not in str(error.value)
    assert not (tmp_path / "run").exists() and not [path for path in hub.paths if path != "/api/whoami-v2"]


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "me/", "https://hub/me/tiny", "me/a b"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"export.push_to_hub=.* is not allowed; it must be USER/NAME"):
        ExportConfig(push_to_hub=name)


def test_a_run_that_the_hub_refused_pushes_when_resumed(config: TrainConfig, hub: Hub) -> None:
    hub.refuses = True
    with pytest.raises(ValueError, match=r"the hub refused: .*; all of it is in .*; resume=.* tries again"):
        run(config)
    folder = Path(str(config.run.dir))
    assert (folder / "packed").is_dir() and json.loads((folder / "result.json").read_text())["status"].startswith("failed: ")
    hub.refuses = False
    hub.calls.clear()
    assert run(load_config(str(folder))).status == "done" and "README.md" in hub.committed()
