"""`--help GROUP` explains a group: its options, and its keys with types and defaults, in 80 columns."""

from __future__ import annotations

import os

import pytest

from qat.config.compose.command import parse
from qat.config.compose.help import help_text
from qat.config.compose.keys import options
from qat.config.describe import keys, sections
from qat.config.flags import VERBOSE
from qat.config.run import TrainConfig
from qat.ops.choice import Status
from qat.train import main


@pytest.mark.parametrize("group", sections(TrainConfig))
def test_every_key_of_a_section_is_explained(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_text(["--help", group])
    for key in keys(sections(TrainConfig)[group], f"{group}."):
        assert f"\n{key.name}  " in text and " ".join(key.doc.split()) in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_a_key_has_its_type_and_default() -> None:
    lines = help_text(["--help", "trainer"]).splitlines()
    assert "trainer.max_steps  whole number, default 1000" in lines
    assert "trainer.val_every  whole number or null, default null" in lines


@pytest.mark.parametrize("group", options())
def test_every_option_of_a_group_is_named(group: str) -> None:
    text = help_text([group, "-h"])
    assert all(f"\n  {name}" in text for name in options()[group])


def test_an_unknown_group_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--help", "optimizer"])
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert (
        shown.err.startswith("qat.train: --help optimizer: there is no such group; choose one of recipe, ")
        and "optim," in shown.err
    )


def test_verbose_is_heard_anywhere_and_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VERBOSE, raising=False)
    assert parse(["recipe=quickstart"]).settings == ["recipe=quickstart"] and VERBOSE not in os.environ
    assert parse(["recipe=quickstart", "-v", "seed=1"]).settings == ["recipe=quickstart", "seed=1"]
    assert os.environ[VERBOSE] == "1"


def test_where_kernels_lie_is_for_verbose_and_why_there_are_none_is_for_everybody() -> None:
    assert Status("compiled", "avx512 kernels from /a/b.so; floats run in pure torch").short == "avx512 kernels"
    assert Status("reference", "no compiler; get one from somewhere").short == "no compiler; get one from somewhere"
