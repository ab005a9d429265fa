"""Ask a real llama.cpp: perplexity, logits, a greedy continuation, token ids.

It ends the process on inputs that it did not expect, so it runs in a process of its own: `answers.py`, which takes
the names of the file and of two .npz files, a request and the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat.formats.llamacpp.ggml import INSTALL, version
from qat.formats.reader import Reader

PROCESS = Reader(
    Path(__file__).with_name("answers.py"),
    "llama.cpp cannot run {}",
    environment={"GGML_NO_BACKTRACE": "1"},
    lines=3,
)


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
    return PROCESS.ask(file, lambda asked: np.savez(asked, **request, exact=np.array(exact)), _arrays, suffix=".npz")


def _arrays(file: Path) -> dict[str, Any]:
    with np.load(file) as answer:
        return dict(answer)


def window_request(windows: Iterable[tuple[Any, int]]) -> dict[str, NDArray[Any]]:
    """Windows as `ask` takes them; its answer's "nll" is the sum over all scored tokens, and how many they are."""
    request = {}
    for i, (ids, start) in enumerate(windows):
        request[f"window.{i:06d}"], request[f"start.{i:06d}"] = ids.cpu().numpy(), np.array(start)
    return request
