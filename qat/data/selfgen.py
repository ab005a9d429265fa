"""Training text that the full-precision model writes itself: data-free quantization-aware training (LLM-QAT, arXiv:2305.17888).

A batch of sequences grows one token a step through the model's key-value cache. Every sequence starts from the
beginning-of-sequence token; a tokenizer without one starts from its newline, after which any sentence may begin, and one
without either from a token drawn evenly. Tokens are drawn by inverting the cumulative distribution, one uniform number a
sequence from a CPU generator: cheaper than torch.multinomial, and the numbers do not depend on the device.

Measured (glassllm, batch 256, length 128, two threads of an idle two-core machine): 19 thousand tokens/s, 11.7 with transformers'
DynamicCache. With both cores taken by others: 1.0, or 5.4 with OMP_WAIT_POLICY=passive, since libgomp's threads spin.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from qat.config import SelfgenConfig
from qat.data import tokens
from qat.data.order import generator
from qat.models.hub import check_context, embedding_rows
from qat.parallel import as_one, first_here, in_turn, rank, size, together
from qat.terminal.stage import Stage, quietly, stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def sampled_tokens(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    config: SelfgenConfig,
    length: int,
    *,
    valid: bool,
    seed: int,
    folder: Path,
    progress: bool = True,
) -> np.ndarray:
    """Sequences of `length` tokens, one after the other, [T] with T the next multiple of length; cached in `folder`.

    Training (`config.tokens`) and validation samples (`config.valid_tokens`) differ in their seeds.
    Raises ValueError where the teacher's context is below `length`.
    """
    check_context(teacher, length)
    count = math.ceil((config.valid_tokens if valid else config.tokens) / length)
    settings = {**asdict(config), "tokens": count * length, "valid_tokens": valid}
    name = tokens.key("selfgen", weights_hash(teacher), tokens.tokenizer_hash(tokenizer), settings, length, seed)
    found = tokens.read(folder, name)
    if not together(found is None):
        assert found is not None
        return found
    blocks = sample(teacher, tokenizer, config, count, length, generator(seed, int(valid)), progress=progress)
    return _kept(folder, name, blocks, embedding_rows(teacher))


def _kept(folder: Path, name: str, blocks: Iterator[np.ndarray], vocabulary: int) -> np.ndarray:
    """What all ranks have sampled, written by the first of each machine and read by the others there."""
    with as_one():
        if first_here():
            return tokens.write(folder, name, blocks, vocabulary)
        for _ in blocks:
            pass
    if (found := tokens.read(folder, name)) is None:
        raise ValueError(f"{folder}/{name}.bin cannot be read, which another process of this machine has written")
    return found


def weights_hash(model: torch.nn.Module) -> str:
    """A hash of a model's configuration and weights."""
    digest = hashlib.sha256(str(getattr(model, "config", "")).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def sample(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    config: SelfgenConfig,
    count: int,
    length: int,
    random: torch.Generator,
    *,
    progress: bool = True,
) -> Iterator[np.ndarray]:
    """Yield int64 arrays [B * length], B <= `config.batch_size`, until `count` sequences are sampled.

    Ranks sample a batch each at a time, and yield all of them in order. Each draws the random numbers of every batch, which cost
    next to nothing, so that the text is that of one process.
    """
    from qat.inference.decode import why_uncached

    was_training = teacher.training
    teacher.eval()
    why = why_uncached(teacher)
    if why:
        print(f"qat: {why}; every token reads its whole sequence again", file=sys.stderr)
    with quietly(not progress), stage("sampling from the model", count * length, "tokens") as bar:
        for done in range(0, count, config.batch_size * size()):
            mine: list[np.ndarray] = []
            with as_one():
                for here, start in enumerate(range(done, count, config.batch_size)[: size()]):
                    first = first_tokens(tokenizer, min(config.batch_size, count - start), random)
                    numbers = [torch.rand(len(first), 1, generator=random) for _ in range(1, length)]
                    if here == rank():
                        mine.append(_grow(teacher, first, length, config, numbers, bar, not why).numpy().reshape(-1))
            yield from in_turn(mine)
    teacher.train(was_training)


def first_tokens(tokenizer: PreTrainedTokenizerFast, count: int, random: torch.Generator) -> torch.Tensor:
    """The token that each sequence starts with, int64 [count]."""
    start = tokenizer.bos_token_id
    if start is None:
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        start = newline[0] if len(newline) == 1 and newline[0] != tokenizer.unk_token_id else None
    if start is None:
        return torch.randint(len(tokenizer), (count,), generator=random)
    return torch.full((count,), start, dtype=torch.int64)


@torch.inference_mode()
def _grow(
    teacher: PreTrainedModel,
    first: torch.Tensor,
    length: int,
    config: SelfgenConfig,
    numbers: list[torch.Tensor],
    bar: Stage,
    cached: bool,
) -> torch.Tensor:
    """Sequences [B, length] from their first tokens [B], over a cache or by whole passes."""
    from qat.inference.kvcache import buffered_cache

    device = next(teacher.parameters()).device
    ids = torch.empty(len(first), length, dtype=torch.int64, device=device)
    ids[:, 0] = first
    cache = buffered_cache(teacher, length) if cached else None
    for position in range(1, length):
        if cached:
            last = ids[:, position - 1 : position]
            logits = teacher(input_ids=last, past_key_values=cache, use_cache=True).logits[:, -1]
        else:
            logits = teacher(input_ids=ids[:, :position], use_cache=False).logits[:, -1]
        uniform = numbers[position - 1].to(device)
        ids[:, position] = draw(logits.float(), uniform, config.temperature, config.top_k)
        bar.advance(len(first))
    bar.advance(len(first))
    return ids.cpu()


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float = 1.0, top_k: int | None = None) -> torch.Tensor:
    """One token a row, int64 [B], from logits [B, V] and uniform numbers [B, 1] in [0, 1), among the `top_k` likeliest."""
    kept = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, kept = logits.topk(top_k)
    summed = torch.softmax(logits / temperature, -1).cumsum(-1)
    # right=True never lands on a token of probability 0; rounding may make uniform * total equal the total, hence the clamp
    place = torch.searchsorted(summed, uniform * summed[:, -1:], right=True).clamp_(max=summed.shape[-1] - 1)
    return (place if kept is None else kept.gather(-1, place)).squeeze(-1)
