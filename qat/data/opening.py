"""The data of a run: opened before the model is loaded, or sampled from the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qat.config import TrainConfig
from qat.data import preview
from qat.data.build import build_datamodule, check_text, text_tokens
from qat.data.datamodule import QATData
from qat.models.hub import context_length, embedding_rows
from qat.terminal.lines import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def open_data(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, batches: int) -> QATData | None:
    """The data, before the model is loaded: whatever is wrong with it is said at once. None where the model writes it itself.

    A dry run prints what there is of it, and a sample with what is learned. `batches` is what a device takes in the whole run.
    """
    for text in config.eval.texts.values():
        text_tokens(text, tokenizer, config.data, config.eval.max_tokens)
    if config.data.sampled:
        check_text(config.data, tokenizer)
        return None
    data = build_datamodule(config.data, tokenizer, seed=config.seed, total_batches=batches)
    say(*data.notes)
    if config.dry_run:
        print(*preview.lines(data, tokenizer, config.trainer.devices * config.trainer.num_nodes), sep="\n")
    return data


def sampled_data(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, base: PreTrainedModel, batches: int) -> QATData:
    """The data that the full-precision model samples."""
    return build_datamodule(config.data, tokenizer, teacher=base, seed=config.seed, total_batches=batches)


PROBE_TOKENS = 32


def probe_batch(data: QATData | None, base: PreTrainedModel) -> dict[str, Any]:
    """What conversion probes the model with, input_ids int64 [1, T]: training's first tokens, or any where it writes its own.

    Without a cache, as in training: some models do not run with theirs.
    """
    if data is not None:
        return {"input_ids": data.train[0]["input_ids"][None, :PROBE_TOKENS], "use_cache": False}
    length = min(PROBE_TOKENS, context_length(base) or PROBE_TOKENS)
    ids = torch.randint(embedding_rows(base), (1, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "use_cache": False}
