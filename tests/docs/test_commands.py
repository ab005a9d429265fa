"""What README and docs show works: their python runs, their commands compose, their files exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from qat.config.compose.keys import check_keys, options

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    (page, language, block)
    for page in PAGES
    for language, block in re.findall(r"```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    if page.name != "commands.md"  # made from --help
]
LINES = [(page, line.partition("  #")[0].partition(" # ")[0].strip()) for page, _, block in BLOCKS for line in block.splitlines()]
COMMANDS = sorted({line for _, line in LINES if re.match(r"(python -m qat\.|qat )[a-z]", line)})
VERBS = ("train", "report", "damage", "plan", "evaluate", "generate", "export", "inspect", "serve", "bench", "ops.build")


@pytest.mark.parametrize(
    "code", [code for page, language, code in BLOCKS if language == "python" and "qat.convert(model" in code]
)
def test_python_runs(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 linear layers converted" in done.stdout


@cache
def _help(verb: str) -> str:
    return subprocess.run([sys.executable, "-m", f"qat.{verb}", "--help"], capture_output=True, text=True, cwd=ROOT).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_real_recipes_keys_and_verbs(command: str) -> None:
    words = shlex.split(command.removeprefix("python -m qat.").removeprefix("qat "))
    assert words[0] in VERBS, f"there is no verb {words[0]}"
    if words[0] != "train":
        assert [word for word in words if word.startswith("--") and word not in _help(words[0])] == []
        return
    overrides = [word for word in words[1:] if "=" in word]
    check_keys(overrides)
    groups = options()
    for key, _, value in (override.partition("=") for override in overrides):
        assert key not in groups or set(value.split(",")) <= set(groups[key])


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {target for _, line in LINES for target in re.findall(r"^make ([\w-]+)", line)}
    assert {"quickstart", "test"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.M)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    found = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in found if not link.startswith("https://") and not (page.parent / link).exists()] == []


def test_the_readme_is_one_to_read() -> None:
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 120
