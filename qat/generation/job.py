"""The job of `python -m qat.generate`: a prompt in, its continuation streamed, what it cost said."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

from qat.generation.continuation import Continuation, continue_tokens, stop_tokens
from qat.generation.memory import memory
from qat.models.any import Loaded, load
from qat.models.heads import refuse_classifier
from qat.nn.sampling import Sampling, sampler
from qat.terminal.stage import stage


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
    refuse_classifier(found.model, path)
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
    if threads is not None:
        most = os.cpu_count() or 1
        if not 1 <= threads <= most:
            raise ValueError(f"--threads {threads} is not allowed; it must be from 1 to {most}, this machine's cores")
        torch.set_num_threads(threads)
    with stage(f"loading {path}"):
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
