"""The verb `python -m qat.generate MODEL --prompt TEXT`: a model's continuation, streamed, with its speed and memory.

Plain flags, no Hydra: prompts are not Hydra grammar. The text goes to stdout, everything else to stderr. Packed models run
as `qat.inference.tiles` makes them: fused, and with a head of 6 or 8 bits if asked for.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.config.flags import add_model, run_verb
from qat.models.any import Loaded, load

if TYPE_CHECKING:
    from torch import Tensor

    from qat.inference.decode import Decoder


@dataclass
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn from the smallest set of at least top_p."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-6 <= self.temperature < float("inf"):
            raise ValueError(
                f"--temperature {self.temperature} is not allowed; it must be 0 (the likeliest token) or from 1e-6 on"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed} is not allowed; it must be from 0 to {2**63 - 1}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p} is not allowed; it must be above 0 and at most 1")


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


def sampler(sampling: Sampling) -> Callable[[Tensor], int]:
    """A function from logits [V] to the next token."""
    import torch

    generator = torch.Generator().manual_seed(sampling.seed)

    def choose(logits: Tensor) -> int:
        if not bool(torch.isfinite(logits.max())):
            raise ValueError("the model's logits are not finite; python -m qat.evaluate says more about it")
        if sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = (logits.float() / sampling.temperature).softmax(0)
        kept, ids = nucleus(probabilities, sampling.top_p)
        return int(ids[torch.multinomial(kept, 1, generator=generator)])

    return choose


def nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """(probabilities, ids) of the smallest set of likeliest tokens whose sum reaches top_p (arXiv:1904.09751).

    Looks at the 256 likeliest first: sorting a large vocabulary costs more than a small model's step.
    """
    import torch

    size = len(probabilities)
    if top_p == 1:
        return probabilities, torch.arange(size)
    for count in (min(256, size), size):
        kept, ids = probabilities.topk(count)
        before = kept.cumsum(0) - kept
        if count == size or float(before[-1] + kept[-1]) >= top_p:
            break
    inside = before < top_p
    return kept[inside], ids[inside]


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


def _check_request(prompt: str, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens} is not allowed; it must be at least 1")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # what Python makes of other bytes
        raise ValueError("--prompt is not UTF-8")


def prompt_ids(tokenizer: Any, prompt: str, chat: bool, system: str | None) -> Tensor:
    """Token ids int64 [T] of a plain prompt, or of one user message in the tokenizer's chat template.

    Raises:
        ValueError: an empty prompt, --system without --chat, or no chat template.
    """
    import torch

    if system is not None and not chat:
        raise ValueError("--system needs --chat")
    if not chat:
        ids = tokenizer(prompt)["input_ids"]
    elif not tokenizer.chat_template:
        raise ValueError("--chat: this tokenizer has no chat template; leave --chat out to continue plain text")
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        raise ValueError("--prompt has no tokens; give at least one")
    return torch.tensor(ids)


def room_for(model: Any, prompt: int, max_new_tokens: int) -> int:
    """How many new tokens fit into the model's context; says so on stderr where that is less than was asked for.

    Raises:
        ValueError: the prompt alone fills the context.
    """
    from qat.models.hub import context_length

    most = context_length(model)
    if most is None or prompt + max_new_tokens <= most:
        return max_new_tokens
    if prompt >= most:
        raise ValueError(f"the prompt has {prompt} tokens, but the model's context is {most}; shorten it")
    print(f"qat: {most - prompt} new tokens at most, as the model's context is {most} tokens", file=sys.stderr)
    return most - prompt


def ready(path: str, head: str = "full", trust_remote_code: bool = False) -> tuple[Loaded, str]:
    """Load `path` and prepare it for generation; and what was done to it, in words."""
    from qat.inference import digits, heads, tiles

    found = load(path, trust_remote_code=trust_remote_code)
    found.model.requires_grad_(False)
    tiled = tiles.tile_checked(found.model)
    if head == "full":
        stored = heads.stream_head(found.model)
    else:
        digits.quantize_head(found.model, head)
        stored = f"{head} head"
    return found, "; ".join([found.kind, *([tiled] if tiled else []), stored])


def generate(
    path: str,
    prompt: str,
    *,
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    threads: int | None = None,
    head: str = "full",
    trust_remote_code: bool = False,
) -> Continuation:
    """Print the continuation of `prompt` as it comes; its tokens and timings.

    Args:
        path: run folder, packed folder, Hugging Face folder, .gguf, hub id, package://NAME/FILE.
        chat: put the prompt into the tokenizer's chat template; `system` is its system message.
        head: `full`, or `bf16`, `8bit`, `6bit`: the output head in fewer bits.
        trust_remote_code: whether Python code that comes with the weights may run.

    Raises:
        ValueError: the model cannot be loaded, or an argument is out of range.
    """
    sampling = Sampling(temperature, top_p, seed)
    _check_request(prompt, max_new_tokens)
    import torch

    if threads is not None:
        most = os.cpu_count() or 1
        if not 1 <= threads <= most:
            raise ValueError(f"--threads {threads} is not allowed; it must be from 1 to {most}, this machine's cores")
        torch.set_num_threads(threads)
    found, about = ready(path, head, trust_remote_code)
    from transformers import TextStreamer

    from qat.inference.decode import Decoder

    ids = prompt_ids(found.tokenizer, prompt, chat, system)
    count = room_for(found.model, len(ids), max_new_tokens)
    print(f"qat: {path}: {about}", file=sys.stderr, flush=True)
    streamer = TextStreamer(found.tokenizer, skip_special_tokens=True)
    stop = stop_tokens(found.model, found.tokenizer)
    done = Continuation(len(ids))
    decoder = Decoder(found.model, len(ids) + count)
    if decoder.why:
        print(f"qat: {decoder.why}; every token reads the whole text again", file=sys.stderr, flush=True)
    for done in continue_tokens(decoder, ids, count, stop, sampler(sampling)):
        streamer.put(torch.tensor(done.tokens[-1:]))
    streamer.end()
    print(f"qat: {done.summary()}; {torch.get_num_threads()} threads, {memory()}", file=sys.stderr)
    return done


def memory() -> str:
    """The process's peak resident memory, in words."""
    return f"peak memory {peak_bytes() / 2**20:,.0f} MiB"


def peak_bytes() -> int:
    """Linux keeps it by process; getrusage's value, taken elsewhere, begins with that of the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qat.generate", description="Continue a text, token by token.")
    add_model(parser)
    parser.add_argument("--prompt", required=True, help="text to continue, or - to read it from stdin")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    parser.add_argument("--system", help="with --chat: the system message")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="stop after so many tokens (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest that reach this sum (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after a user's error, which is one line on stderr."""
    args = vars(_parser().parse_args(arguments))
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # stock unpacking is compiled at its first call: 19 s on a CPU
    path, prompt = args.pop("model"), args.pop("prompt")
    return run_verb("generate", lambda: generate(path, sys.stdin.read() if prompt == "-" else prompt, **args))


if __name__ == "__main__":
    sys.exit(main())
