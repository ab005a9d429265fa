"""Tokens one after another, and the time that each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qat.inference.decode import Decoder


@dataclass
class Continuation:
    """Tokens that were generated and what they cost. Decoding is every token but the first, which prefill gives."""

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """Generated tokens a second, sampling and printing included; 0 where only one was generated."""
        return len(self.step_seconds) / sum(self.step_seconds) if self.step_seconds else 0.0

    def summary(self) -> str:
        """One line a person reads."""
        decoded = (
            f"decode {len(self.step_seconds)} tokens, {self.decode_rate:.1f} tokens/s" if self.step_seconds else "no decoding"
        )
        return f"prefill {self.prompt_tokens} tokens, {self.prefill_rate:.1f} tokens/s; {decoded}"


def continue_tokens(
    decoder: Decoder, prompt: Tensor, max_new_tokens: int, stop: set[int], choose: Callable[[Tensor], int]
) -> Iterator[Continuation]:
    """Yield the growing continuation after each token; ends at `max_new_tokens` or after a token of `stop`."""
    done, clock = Continuation(len(prompt)), time.perf_counter
    start = clock()
    logits = decoder.read(prompt)
    last = clock()
    done.prefill_seconds = last - start
    while True:
        token = choose(logits)
        done.tokens.append(token)
        yield done
        if token in stop or len(done.tokens) == max_new_tokens:
            return
        logits = decoder.read(prompt.new_tensor([token]))
        start, last = last, clock()
        done.step_seconds.append(last - start)


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The ids that end a text, of the model's generation config and of its tokenizer."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id}
    return {i for i in ids if i is not None}
