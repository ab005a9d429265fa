"""A few generated texts at each validation: the quickest way to see that a model has turned into gibberish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class Samples(pl.Callback):
    """Continues prompts [n, P] greedily, which draws no random numbers, and appends the texts to a file."""

    def __init__(self, prompts: Tensor, tokenizer: Any, file: Path, new_tokens: int = 48) -> None:
        self.prompts, self.tokenizer, self.file, self.new_tokens = prompts, tokenizer, file, new_tokens

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """After each validation. All ranks generate, as a model that is sharded needs all of them; the first writes."""
        if trainer.sanity_checking or not len(self.prompts):
            return
        texts = self.generate(module.student, module.device)
        if not trainer.is_global_zero:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"## step {trainer.global_step}\n\n" + "".join(f"> {text!r}\n\n" for text in texts))

    def generate(self, model: Any, device: torch.device) -> list[str]:
        """Prompt and continuation of each prompt, as text."""
        training = model.training
        model.eval()
        prompts = self.prompts.to(device)
        with torch.inference_mode():
            tokens = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=self.new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
            )
        model.train(training)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
