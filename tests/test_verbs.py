"""`qat VERB` is `python -m qat.VERB`: one table names every verb, and nothing heavy is imported before one runs."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import qat
from qat.__main__ import VERBS

PACKAGE = Path(qat.__file__).parent
NO_VERBS = {"__init__", "__main__", "registration", "namesakes"}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)


def test_every_verb_is_in_the_table() -> None:
    files = {file.stem for file in PACKAGE.glob("*.py")} - NO_VERBS
    folders = {file.parent.name for file in PACKAGE.glob("*/__main__.py")}
    assert files | folders == set(VERBS) - {"build"}
    assert all(find_spec(module) for module, _ in VERBS.values())


@pytest.mark.parametrize("verb", ["inspect", "train"])
def test_a_verb_is_its_module(verb: str) -> None:
    theirs, ours = run("-m", f"qat.{verb}", "--help"), run("-m", "qat", verb, "--help")
    assert ours.returncode == theirs.returncode == 0 and ours.stdout == theirs.stdout != ""
    theirs, ours = run("-m", f"qat.{verb}", "--nonsense"), run("-m", "qat", verb, "--nonsense")
    assert ours.returncode == theirs.returncode == 2 and ours.stderr == theirs.stderr != ""


def test_help_version_and_a_wrong_verb() -> None:
    assert (
        all(f"  {verb} " in run("-m", "qat").stdout for verb in VERBS)
        and run("-m", "qat").stdout == run("-m", "qat", "-h").stdout
    )
    assert run("-m", "qat", "--version").stdout == f"qat-bitlinear {qat.__version__}\n"
    done = run("-m", "qat", "trian")
    assert done.returncode == 2
    assert done.stderr.startswith("qat: there is no verb 'trian'; did you mean train. Allowed: train, evaluate,")


def test_the_table_needs_nothing_heavy() -> None:
    heavy = ["torch", "hydra", "omegaconf", "lightning", "transformers", "numpy"]
    done = run(
        "-c", f"import sys, qat.__main__ as m; sys.argv[1:] = []; m.main(); print([h for h in {heavy} if h in sys.modules])"
    )
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr
