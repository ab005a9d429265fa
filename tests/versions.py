"""`make versions`: the tests that another version of a library could break, in an environment where only that version differs.

    python tests/versions.py transformers==5.20.0 transformers==5.24.0

A whole environment would fetch torch again for each. So a virtual environment is made that sees this one's packages behind its
own, and gets the named version (and what that needs otherwise) only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    "tests/nn",  # first: nothing is traced any more once tests/inference has generated
    "tests/test_verbs.py",
    "tests/formats/test_quantizer.py",
    "tests/formats/test_bitnet.py",
    "tests/inference/test_generate.py",
    "tests/models/test_models.py",
]
"""Where private or young names of torch, transformers and lightning are leaned on."""


def environment(folder: Path, requirement: str) -> Path:
    """A virtual environment's python, with the requirement installed before everything that is here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout.strip())
    (own / "behind.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", requirement], check=True)
    return python


def passes(requirement: str) -> bool:
    """Whether the tests pass with that version; what is really imported is printed before they run."""
    name = requirement.partition("==")[0]
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder), requirement)
        print(f"== {requirement}, Python {sys.version.split()[0]}", flush=True)
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        used = f"import {name}; print({name}.__version__, {name}.__file__); assert {folder!r} in {name}.__file__"
        ran = [
            subprocess.run([python, *words], cwd=ROOT, env=variables).returncode
            for words in (["-c", used], ["-m", "pytest", *TESTS])
        ]
        return not any(ran)


if __name__ == "__main__":
    failed = [requirement for requirement in sys.argv[1:] if not passes(requirement)]
    sys.exit(f"not with {', '.join(failed)}" if failed else 0)
