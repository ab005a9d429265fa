"""Ask a real llama.cpp: perplexity, logits, a greedy continuation, token ids.

It ends the process on inputs that it did not expect, so it runs in a process of its own: `answers.py`, called with the
names of two .npz files, a request and the answer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat.formats.llamacpp.ggml import INSTALL, version

PROCESS = Path(__file__).with_name("answers.py")


def tokenize(file: str | Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the tokens that the file adds around a text. Errors as `ask`."""
    answer = ask(file, {"texts": np.array(list(texts), dtype=np.str_)})
    return [answer[f"ids.{i:06d}"].tolist() for i in range(len(texts))]


def ask(file: str | Path, request: Mapping[str, Any], *, exact: bool = True) -> dict[str, Any]:
    """Answer a request (see `answers`) in a process of its own; not `exact`: keys and values as llama.cpp keeps them.

    Raises:
        ValueError: llama-cpp-python is not installed, the file is missing, or llama.cpp refused it; its last words are quoted.
    """
    if version() is None:
        raise ValueError(f"llama-cpp-python is not installed: {INSTALL}")
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}")
    with tempfile.TemporaryDirectory(prefix="qat-llamacpp-") as scratch:
        asked, answered = Path(scratch, "request.npz"), Path(scratch, "answer.npz")
        np.savez(asked, **request, path=np.array(str(file)), exact=np.array(exact))
        command = [sys.executable, "-P", str(PROCESS), str(asked), str(answered)]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "GGML_NO_BACKTRACE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            raise ValueError(f"llama.cpp cannot run {file}: {' / '.join(lines[-3:])}")
        with np.load(answered) as answer:
            return dict(answer)


def window_request(windows: Iterable[tuple[Any, int]]) -> dict[str, NDArray[Any]]:
    """Windows as `ask` takes them; its answer's "nll" is the sum over all scored tokens, and how many they are."""
    request = {}
    for i, (ids, start) in enumerate(windows):
        request[f"window.{i:06d}"], request[f"start.{i:06d}"] = ids.cpu().numpy(), np.array(start)
    return request
