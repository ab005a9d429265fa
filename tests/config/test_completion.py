"""What a shell is told of `qat` by argcomplete: verbs, settings of `train` with their values, and the flags of the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("argcomplete")

ROOT = Path(__file__).resolve().parents[2]


def completions(line: str, folder: Path) -> list[str]:
    """As bash asks, with argcomplete's answer in a file instead of a file descriptor."""
    answer = folder / "answer"
    answer.write_text("")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    done = subprocess.run([sys.executable, "-m", "qat"], capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done
    return answer.read_text().split("\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qat ge", ["generate"]),
        (
            "qat ",
            [
                "train",
                "evaluate",
                "generate",
                "export",
                "inspect",
                "plan",
                "damage",
                "report",
                "dashboard",
                "serve",
                "bench",
                "build",
            ],
        ),
        ("qat train rec", ["recipe="]),
        ("qat train quant.gr", ["quant.granularity=", "quant.group_size="]),
        ("qat train recipe=qu", ["quickstart"]),
        ("qat train recipe=quickstart quant.granularity=", ["tensor", "channel", "group"]),
        ("qat train trainer.compile=t", ["true"]),
        ("qat train quant.act_bits=", ["4", "8", "null"]),
        ("qat train nothing.at=", [""]),
        ("qat train --dr", ["--dry-run"]),
        ("qat evaluate model --tea", ["--teacher"]),
        ("qat evaluate model --head b", ["bf16"]),
        ("qat build --cuda", ["--cuda-arch"]),
    ],
)
def test_completions(line: str, expected: list[str], tmp_path: Path) -> None:
    found = completions(line, tmp_path)
    assert sorted(found) == sorted(expected)
