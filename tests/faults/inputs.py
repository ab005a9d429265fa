"""A model and a text small enough to be trained a thousand times."""

from __future__ import annotations

from pathlib import Path


def write_model(folder: Path) -> Path:
    """A random Llama with a character tokenizer, as a transformers folder."""
    import tiny

    return tiny.write_model(folder, hidden_size=64, intermediate_size=128, num_hidden_layers=1)


def write_text(file: Path) -> Path:
    """9,000 characters that a tiny model can learn."""
    words = ["the cat sat.", "a dog ran,", "we see the sun.", "birds fly over the hill,"]
    file.write_text("\n".join(words[(i * i + i // 7) % 4] for i in range(600)))
    return file
