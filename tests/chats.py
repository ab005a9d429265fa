"""Chat templates, chats and a tokenizer of one token a byte, for the tests of data."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '$' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHORT = "{% for m in messages %}{{ m.role + m.content + '$' }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '$' }}{% endgeneration %}{% else %}{{ m.content + '$' }}{% endif %}{% endfor %}"
)


def say(*turns: str, first: str = "user") -> list[dict[str, str]]:
    """Turns of user and assistant, one after the other."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def bytewise(template: str, *, trim: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges; `trim`: its offsets leave blanks out."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = template
    return tokenizer


def write_chat_model(model: Path, folder: Path) -> None:
    """A copy of a model's folder whose tokenizer has a template of few letters, for models of few tokens."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = SHORT
    tokenizer.save_pretrained(folder)
