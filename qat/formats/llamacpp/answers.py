"""Answer one request by llama.cpp, in a process of its own, with no line of qat or torch, whose OpenMP would meet llama.cpp's.

    python -P answers.py FILE REQUEST ANSWER

FILE is a GGUF file, the others are .npz files. REQUEST holds `exact`, and any of: `window.I` int64 [B, L] with `start.I` (in each
row, tokens from there on are scored), `probes` int64 [B, T], `prompt` int64 [T] with `count`, `texts`. ANSWER holds for these:
`nll` float64 [sum, count], `logits` float32 [B, T, V], `continuation` int64 [count] (the likeliest tokens; an end-of-text token
does not stop it), and `ids.I` of each text.

Where `exact`, attention keeps float32 keys and values, where llama.cpp's default is float16: then what remains of a difference to
PyTorch is the quantization of activations, in blocks of 256 (TQ1_0, TQ2_0) or 32 (Q1_0, Q2_0).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
_ROWS = 64  # of logits at a time, in float64


class Session:
    """A model in llama.cpp. `context` is the longest sequence that it will see."""

    def __init__(self, file: str, context: int, exact: bool) -> None:
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
        settings.n_threads = settings.n_threads_batch = os.cpu_count() or 1
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

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with those that the file adds around it; names of special tokens in it are text."""
        raw = text.encode("utf-8")
        room = len(raw) + 8
        ids = (self._lib.llama_token * room)()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, True, False)
        assert count >= 0, count
        return list(ids[:count])


def answer(path: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """A request's arrays to the answer's (see above), about the file at `path`."""
    windows = sorted(key for key in request if key.startswith("window."))
    count = int(request.get("count", 0))
    lengths = [request[key].shape[-1] for key in (*windows, "probes") if key in request]
    lengths += [len(request["prompt"]) + count] if "prompt" in request else []
    session = Session(path, max(lengths, default=32), bool(request["exact"]))
    found: dict[str, Any] = {}
    if windows:
        total, scored = 0.0, 0
        for key in windows:
            start = int(request["start." + key.removeprefix("window.")])
            total += sum(session.negative_log_likelihood(row, start) for row in request[key])
            scored += request[key][:, start:].size
        found["nll"] = np.array([total, scored])
    if "probes" in request:
        found["logits"] = np.stack([session.decode(row.tolist()) for row in request["probes"]])
    if "prompt" in request:
        found["continuation"] = np.array(session.greedy(request["prompt"], count))
    if "texts" in request:
        for i, text in enumerate(request["texts"].tolist()):
            found[f"ids.{i:06d}"] = np.array(session.tokenize(text), dtype=np.int64)
    return found


if __name__ == "__main__":
    with np.load(sys.argv[2]) as file:
        np.savez(sys.argv[3], **answer(sys.argv[1], dict(file)))
