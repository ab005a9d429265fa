"""Dashboards as code: what they draw is in the table of metrics, and without a key their specification is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb_workspaces")

from qat import dashboard
from qat.monitor.table import HEALTH, find
from qat.reporting.dashboard import SECTIONS, metrics, patterns, specification
from qat.training.loggers.weights_and_biases import SINK

COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "dashboard.json"


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def test_each_metric_of_the_dashboards_is_in_the_table(no_key: None) -> None:
    spec = json.loads(specification("entity", "qat"))
    sections = spec["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    assert tuple(one["name"] for one in sections) == SECTIONS
    names = metrics(spec) - {"_step"}
    assert len(names) > 25 and all(find(name) for name in names)
    assert metrics(spec["report"]) >= {"train/loss", "result/log_ratio_trained"}
    drawn = patterns(spec)
    assert all(any(re.fullmatch(one, f"quant/down/{name}") for one in drawn) for name in HEALTH)
    assert any(re.fullmatch(one, "optim/lr/latent") for one in drawn)
    kinds = json.dumps(sections[-1])
    assert all(word in kinds for word in ("Parallel Coordinates Plot", "Parameter Importance", "Run Comparer"))


def test_the_committed_specification_is_current(no_key: None) -> None:
    assert COMMITTED.read_text() == specification("entity", "qat")


def test_without_a_key_the_specification_is_written(
    no_key: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dashboard.main(["--project", "me/mine"]) == 0
    assert "there is no key" in capsys.readouterr().out
    spec = json.loads((tmp_path / "dashboard.json").read_text())
    assert (spec["workspace"]["entity"], spec["workspace"]["project"]) == ("me", "mine")


@pytest.mark.parametrize("project", ["", "a/b/c", "me/"])
def test_a_project_that_is_no_name_is_one_line(no_key: None, project: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dashboard.main(["--project", project]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "PROJECT or ENTITY/PROJECT" in error


@pytest.mark.parametrize("kind", ["AuthenticationError", "CommError"])
def test_a_key_that_is_not_taken_is_one_line(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def login(**_: Any) -> bool:
        raise getattr(wandb.errors, kind)("Failed to authenticate\nwith a server")

    monkeypatch.setattr(wandb, "login", login)
    assert dashboard.main(["--project", "mine"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("qat.dashboard: Weights & Biases does not take its key: Failed to auth") and said.count("\n") == 1
    with pytest.raises(ValueError, match="does not take its key"):
        SINK.check("logger.wandb", {"offline": False})


def test_an_unknown_project_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import wandb

    class Api:
        default_entity = "me"

        def project(self, name: str, entity: str) -> Any:
            raise RuntimeError(f"Could not find project\n{name}")

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "Api", Api)
    assert dashboard.main(["--project", "nowhere"]) == 2
    assert "--project me/nowhere: there is no such project" in capsys.readouterr().err
