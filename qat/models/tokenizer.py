"""The tokenizer that belongs to a model, from wherever the model is."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.config import ModelConfig
from qat.formats import upstream
from qat.formats.gguf import container as gguf_file
from qat.formats.gguf import splits
from qat.formats.gguf import tokenizer as gguf_tokenizer
from qat.models.glass import load_glass_tokenizer
from qat.models.source import arguments_for, explain, resolve, stock_readable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(config: ModelConfig, path: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer that belongs to the model. Raises ValueError where there is none, only a slow one, or a damaged one."""
    source = resolve(path or config.path, "model.teacher" if path else "model.path")
    tokenizer = _tokenizer_of(config, path, source)
    try:
        tokenizer.decode(tokenizer("A word, 12.")["input_ids"])  # what is damaged is found here, not in the middle of a run
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # any class of Python's, and tokenizers' panics, which are no Exceptions
        raise ValueError(explain("tokenizer", source, error)) from error
    return tokenizer


def _tokenizer_of(config: ModelConfig, path: str | None, source: str) -> PreTrainedTokenizerFast:
    if source.endswith(".npz"):
        return load_glass_tokenizer(source)
    upstream.listen()
    from transformers import AutoTokenizer

    metadata = gguf_file.read(source).metadata if source.endswith(".gguf") else {}
    if gguf_tokenizer.WHOLE in metadata:
        return _whole_tokenizer(str(metadata[gguf_tokenizer.WHOLE]), source)
    with stock_readable(source, weights=False) as readable:
        arguments = arguments_for(config, path, readable)
        folder = str(Path(readable).parent) if "gguf_file" in arguments else readable
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, **arguments)
        except Exception as error:
            raise ValueError(explain("tokenizer", source, error)) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"the tokenizer of {source} is {type(tokenizer).__name__}, a slow one; a tokenizer.json is needed")
    return _split_as_named(tokenizer, metadata, source) if metadata else tokenizer


def _whole_tokenizer(text: str, source: str) -> PreTrainedTokenizerFast:
    """A tokenizer.json that a .gguf file holds."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        unknown = json.loads(text)["model"].get("unk_token")
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), unk_token=unknown)
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(explain("tokenizer", source, error)) from error


def _split_as_named(tokenizer: Any, metadata: Mapping[str, Any], source: str) -> PreTrainedTokenizerFast:
    """transformers takes some split for all files of an architecture; digits would be other tokens than the model knows."""
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    pre, level = metadata.get("tokenizer.ggml.pre"), "ByteLevel" in str(backend.pre_tokenizer)
    if pre is None or metadata.get("tokenizer.ggml.model") != "gpt2" or not level:
        return tokenizer
    if not splits.set_split(tokenizer, str(pre)):
        print(
            f"qat: {source} names the text split {pre!r}, which qat does not know: the tokens may differ from llama.cpp's",
            file=sys.stderr,
        )
        return tokenizer
    if type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    # an architecture's own class would take its own split again when it is loaded from a folder
    about = {**tokenizer.special_tokens_map, "model_max_length": tokenizer.model_max_length}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **about)
