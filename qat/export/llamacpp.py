"""Run GGUF files in a real llama.cpp: perplexity, logits, greedy continuations, token ids, speed.

llama.cpp comes with the optional package llama-cpp-python. It ends the process on inputs that it did not expect, so it runs in a
process of its own: this file, called with the names of two .npz files, a request and the answer. It imports neither qat nor
torch, whose OpenMP would meet llama.cpp's.

Attention keeps float32 keys and values here (`exact`), where llama.cpp's default is float16: then what remains of a difference to
PyTorch is the quantization of activations, in blocks of 256 (TQ1_0, TQ2_0) or 32 (Q1_0, Q2_0).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

INSTALL = "make llama-cpp, or pip install llama-cpp-python (it compiles llama.cpp: cmake and g++, about 6 minutes on 2 cores)"
Ids = NDArray[np.int64]
_ROWS = 64  # of logits at a time, in float64


def version() -> str | None:
    """The installed llama-cpp-python's version, or None."""
    from importlib import metadata

    try:
        return metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        return None


def perplexity(file: str | Path, windows: Iterable[tuple[Any, int]], *, exact: bool = True, threads: int | None = None) -> float:
    """Perplexity on the windows of `qat.perplexity.windows`; errors as `ask`."""
    nll, count = ask(file, window_request(windows), exact=exact, threads=threads)["nll"]
    return float(np.exp(nll / count))


def logits(file: str | Path, ids: Any, *, exact: bool = True) -> NDArray[np.float32]:
    """Logits float32 [B, T, V] of token ids [B, T]; errors as `ask`."""
    return ask(file, {"probes": _ids(ids)}, exact=exact)["logits"]


def greedy(file: str | Path, prompt: Sequence[int], count: int, *, exact: bool = True) -> list[int]:
    """The `count` likeliest next tokens, one after another; an end-of-text token does not stop it. Errors as `ask`."""
    return ask(file, {"prompt": _ids(prompt), "count": np.array(count)}, exact=exact)["continuation"].tolist()


def tokenize(file: str | Path, texts: Sequence[str], special: bool = False) -> list[list[int]]:
    """Token ids of each text, with the tokens that the file adds around a text if `special`. Errors as `ask`."""
    answer = ask(file, {"texts": np.array(list(texts), dtype=np.str_), "special": np.array(special)})
    return [answer[f"ids.{i:06d}"].tolist() for i in range(len(texts))]


def speed(file: str | Path, prompt: Sequence[int], count: int = 64, threads: int | None = None) -> dict[str, float]:
    """Tokens a second as llama.cpp runs by default: "prompt" (all at once) and "decode" (one by one). Errors as `ask`."""
    request = {"speed_prompt": _ids(prompt), "count": np.array(count)}
    prompt_rate, decode_rate = ask(file, request, exact=False, threads=threads)["speed"]
    return {"prompt": float(prompt_rate), "decode": float(decode_rate)}


def ask(file: str | Path, request: Mapping[str, Any], *, exact: bool = True, threads: int | None = None) -> dict[str, Any]:
    """Answer a request in a process of its own.

    Raises:
        ValueError: llama-cpp-python is not installed, the file is missing, or llama.cpp refused it; its last words are quoted.
    """
    if version() is None:
        raise ValueError(f"llama-cpp-python is not installed: {INSTALL}")
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}")
    with tempfile.TemporaryDirectory(prefix="qat-llamacpp-") as scratch:
        asked, answered = Path(scratch, "request.npz"), Path(scratch, "answer.npz")
        np.savez(
            asked, **request, path=np.array(str(file)), exact=np.array(exact), threads=np.array(threads or os.cpu_count() or 1)
        )
        command = [sys.executable, "-P", __file__, str(asked), str(answered)]
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
        request[f"window.{i:06d}"], request[f"start.{i:06d}"] = _ids(ids), np.array(start)
    return request


def _ids(ids: Any) -> Ids:
    return np.asarray(ids.cpu() if hasattr(ids, "cpu") else ids, dtype=np.int64)


# block codecs of ggml, in this process


def _ggml() -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"llama-cpp-python is not installed: {INSTALL}")
    folder = Path(list(spec.submodule_search_locations)[0]) / "lib"
    return ctypes.CDLL(str(next(folder.glob("*ggml-base.*"))))


def quantize(values: NDArray[np.float32], number: int) -> NDArray[np.uint8]:
    """Rows of values [N, K] as ggml's blocks of the type of that number. ValueError without llama-cpp-python."""
    lib = _ggml()
    values = np.ascontiguousarray(values, np.float32)
    n, k = values.shape
    lib.ggml_row_size.restype = ctypes.c_size_t
    row = int(lib.ggml_row_size(ctypes.c_int(number), ctypes.c_int64(k)))
    out = np.empty(n * row, np.uint8)
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    where = (ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(out.ctypes.data))
    written = lib.ggml_quantize_chunk(
        ctypes.c_int(number), *where, ctypes.c_int64(0), ctypes.c_int64(n), ctypes.c_int64(k), ctypes.c_void_p()
    )
    assert written == len(out), (written, len(out))
    return out


def dequantize(data: NDArray[np.uint8], name: str, count: int) -> NDArray[np.float32]:
    """`count` weights of ggml's blocks of the type `name` (as ggml spells it: q2_0, tq1_0, q6_K), by ggml's own code."""
    out = np.empty(count, np.float32)
    data = np.ascontiguousarray(data)
    function = getattr(_ggml(), f"dequantize_row_{name}")
    function.restype = None
    function(ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(count))
    return out


# the other process


class Session:
    """A model in llama.cpp. `context` is the longest sequence that it will see."""

    def __init__(self, file: str, context: int, *, exact: bool, threads: int) -> None:
        import llama_cpp
        from llama_cpp._logger import set_verbose

        set_verbose(False)  # errors are still written
        self._lib: Any = llama_cpp
        llama_cpp.llama_backend_init()
        model_settings = llama_cpp.llama_model_default_params()
        model_settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(file), model_settings)
        if not self._model:
            sys.exit("llama.cpp does not load it")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.rows = llama_cpp.llama_vocab_n_tokens(self._vocab)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        if exact:
            settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
            settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            sys.exit(f"llama.cpp makes no context of {context} tokens")
        self._batch = llama_cpp.llama_batch_init(context, 0, 1)

    def decode(self, ids: Sequence[int], start: int = 0, every: bool = True) -> NDArray[np.float32]:
        """Logits float32 [T, V] of ids at positions `start` on (0: a new sequence), or [1, V], of the last alone."""
        if start == 0:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = int(token), start + i, 1, 0
            batch.logits[i] = every or i + 1 == len(ids)
        if self._lib.llama_decode(self._context, batch):
            sys.exit(f"llama.cpp cannot decode {len(ids)} tokens at position {start}")
        values = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(values, (len(ids) if every else 1, self.rows)).copy()

    def negative_log_likelihood(self, ids: Ids, start: int) -> float:
        """Nats of the tokens from index `start` on."""
        scores, total = self.decode(ids.tolist()), 0.0
        for i in range(start - 1, len(ids) - 1, _ROWS):
            rows = scores[i : min(i + _ROWS, len(ids) - 1)].astype(np.float64)
            rows -= rows.max(1, keepdims=True)
            chosen = rows[np.arange(len(rows)), ids[i + 1 : i + 1 + len(rows)]]
            total += float((np.log(np.exp(rows).sum(1)) - chosen).sum())
        return total

    def greedy(self, prompt: Ids, count: int) -> list[int]:
        """The likeliest next token, `count` times."""
        found = [int(self.decode(prompt.tolist(), every=False)[0].argmax())]
        while len(found) < count:
            found.append(int(self.decode(found[-1:], len(prompt) + len(found) - 1)[0].argmax()))
        return found

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids of a text; names of special tokens in it are text."""
        raw = text.encode("utf-8")
        room = len(raw) + 8
        ids = (self._lib.llama_token * room)()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, special, False)
        assert count >= 0, count
        return list(ids[:count])


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    windows = sorted(key for key in request if key.startswith("window."))
    count = int(request.get("count", 0))
    lengths = [request[key].shape[-1] for key in (*windows, "probes") if key in request]
    lengths += [len(request[key]) + count for key in ("prompt", "speed_prompt") if key in request]
    session = Session(
        str(request["path"]), max(lengths, default=32), exact=bool(request["exact"]), threads=int(request["threads"])
    )
    answer: dict[str, Any] = {}
    if windows:
        total, scored = 0.0, 0
        for key in windows:
            start = int(request["start." + key.removeprefix("window.")])
            total += sum(session.negative_log_likelihood(row, start) for row in request[key])
            scored += request[key][:, start:].size
        answer["nll"] = np.array([total, scored])
    if "probes" in request:
        answer["logits"] = np.stack([session.decode(row.tolist()) for row in request["probes"]])
    if "prompt" in request:
        answer["continuation"] = np.array(session.greedy(request["prompt"], count))
    if "texts" in request:
        for i, text in enumerate(request["texts"].tolist()):
            answer[f"ids.{i:06d}"] = np.array(session.tokenize(text, bool(request["special"])), dtype=np.int64)
    if "speed_prompt" in request:
        answer["speed"] = _measure(session, request["speed_prompt"], count)
    return answer


def _measure(session: Session, prompt: Ids, count: int) -> NDArray[np.float64]:
    session.decode(prompt.tolist(), every=False)  # pages the file in
    times = [time.perf_counter()]
    token = int(session.decode(prompt.tolist(), every=False)[0].argmax())
    times.append(time.perf_counter())
    for i in range(count):
        token = int(session.decode([token], len(prompt) + i)[0].argmax())
    times.append(time.perf_counter())
    return np.array([len(prompt) / (times[1] - times[0]), count / (times[2] - times[1])])


if __name__ == "__main__":
    with np.load(sys.argv[1]) as file:
        np.savez(sys.argv[2], **_answer(dict(file)))
