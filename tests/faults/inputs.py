"""A model and a text small enough to be trained a thousand times."""

from __future__ import annotations

from pathlib import Path


def write_model(folder: Path) -> Path:
    """A random Llama with a character tokenizer, as a transformers folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate("?$\n abcdefghijklmnopqrstuvwxyz.,")}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="$")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_text(file: Path) -> Path:
    """9,000 characters that a tiny model can learn."""
    words = ["the cat sat.", "a dog ran,", "we see the sun.", "birds fly over the hill,"]
    file.write_text("\n".join(words[(i * i + i // 7) % 4] for i in range(600)))
    return file
