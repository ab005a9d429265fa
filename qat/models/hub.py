"""Load a pretrained causal language model and its tokenizer, from wherever the user has them.

A model is a hub id, a local folder, a .gguf file, a glassllm .npz file, or `package://NAME/FILE` for a file that an installed
package brings along. Whatever goes wrong is one ValueError that says what, where and what to do: transformers' own errors are
long, and differ from cause to cause. Weights are always float32 on the CPU: quantization-aware training needs them so, and the
trainer moves them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qat.config import ModelConfig
from qat.formats import upstream
from qat.formats.bitnet import reading as bitnet
from qat.formats.dtypes import remember
from qat.formats.dtypes import source_dtypes as source_dtypes
from qat.formats.folder import refuse_depth
from qat.formats.gguf import container as gguf_file
from qat.formats.tensors import all_finite
from qat.models import checkpoint
from qat.models.glass import load_glass_model
from qat.models.heads import CLASSIFIER, LANGUAGE, Head
from qat.models.provenance import gguf_facts, package_license, readme_license
from qat.models.source import arguments_for, explain, resolve, stock_readable
from qat.models.source import hub_found as hub_found
from qat.models.tokenizer import load_tokenizer as load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_FAR = 16


def load_model(config: ModelConfig, path: str | None = None, head: Head = LANGUAGE) -> PreTrainedModel:
    """The pretrained model in float32, eval mode, on the CPU; `path` (default `config.path`) may name another, for a teacher.

    `head` says what lies upon it, a new one where its checkpoint has none and the head may be new.

    `source_dtypes(model)` says in which dtype each of its weights was stored. A bitnet checkpoint (`quant_method: bitnet`) gives
    linear layers with master weights: its own where it has them, otherwise such that quantize to its codes and scales.

    Raises ValueError for: missing files, an architecture that transformers does not know as a causal language model, a checkpoint
    that is otherwise quantized, custom code without `trust_remote_code`, weights that are missing, damaged, not finite, or of
    another shape than the config asks for, and tensors for which the model has no place.
    """
    source = resolve(path or config.path, "model.teacher" if path else "model.path")
    head.refuse_source(source)
    if source.endswith(".npz"):
        model: PreTrainedModel = load_glass_model(source)
    else:
        upstream.listen()
        with stock_readable(source) as readable:
            arguments = arguments_for(config, path, readable)
            load = _from_gguf if "gguf_file" in arguments else _from_files
            model = load(readable, arguments, head)
    _check_finite(model, source)
    if config.attn_implementation is not None:
        _attend_by(model, config.attn_implementation)
    return model.eval()


def _attend_by(model: PreTrainedModel, name: str) -> None:
    """ValueError where this model cannot, or transformers would take another in its place."""
    try:
        model.set_attn_implementation(name)
    except Exception as error:  # a missing package, an unknown name: nearly any class
        raise ValueError(f"model.attn_implementation={name} cannot be used: {' '.join(str(error).split())}") from error
    found = model.config._attn_implementation
    if found != name:
        raise ValueError(f"model.attn_implementation={name} does not fit {type(model).__name__}, which takes {found}")


def _from_files(source: str, arguments: dict[str, Any], head: Head) -> PreTrainedModel:
    """A folder or hub id of transformers, in safetensors or pickled weights, in one file or several."""
    config = _config(source, arguments)
    if method := _quant_method(config):
        head.refuse_quantized(source)
        return _from_bitnet(source, arguments, method)
    where = {key: value for key, value in arguments.items() if key in ("revision", "local_files_only")}
    try:
        files = checkpoint.stored(source, getattr(config, "transformers_weights", None), **where)
        _refuse_adapter(source)
        _refuse_far_sizes(config, files)
        model, report = _pretrained(source, {**arguments, "ignore_mismatched_sizes": True}, head)
    except Exception as error:  # transformers raises nearly any class here: OSError, ValueError, SafetensorError, KeyError, ...
        raise ValueError(explain("model", source, error)) from error
    remember(model, checkpoint.check(model, report, files, source, head))
    return model.float()


def _from_gguf(file: str, arguments: dict[str, Any], head: Head) -> PreTrainedModel:
    """A .gguf file, dequantized."""
    from transformers import GgufConfig

    # without a config of ours, weights may stay in 4 bits where a kernel for them exists
    arguments = {**arguments, "quantization_config": GgufConfig(dequantize=True), "ignore_mismatched_sizes": True}
    try:
        with upstream.no_bars():
            model, report = _pretrained(str(Path(file).parent), arguments, head)
    except Exception as error:
        raise ValueError(explain("model", file, error)) from error
    found = gguf_file.read(file)
    architecture = str(found.metadata["general.architecture"])
    report["unexpected_keys"] = checkpoint.gguf_unexpected(model, report, architecture, found.tensors)
    checkpoint.check(model, report, {}, file, head)
    return model.float()


def _from_bitnet(source: str, arguments: dict[str, Any], method: str) -> PreTrainedModel:
    """Master weights of a bitnet checkpoint; any other quantization is refused."""
    if method != "bitnet":
        raise ValueError(f"{source} is already quantized (quant_method={method}); give the full-precision checkpoint")
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.py"]
        where = {key: value for key, value in arguments.items() if key in ("revision", "local_files_only")}
        folder = Path(snapshot_download(source, allow_patterns=patterns, **where))
    try:
        model: Any = bitnet.load_master(folder)
    except ValueError as error:
        raise ValueError(explain("model", str(folder), error)) from error
    return model


def _pretrained(folder: str, arguments: dict[str, Any], head: Head) -> tuple[PreTrainedModel, dict[str, Any]]:
    arguments = {**arguments, **head.arguments()}
    loaded: Any = head.auto().from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **arguments)
    return loaded


def _config(source: str, arguments: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, **arguments)
    except Exception as error:
        raise ValueError(explain("model", source, error)) from error


def config_of(config: ModelConfig, source: str) -> Any:
    """What transformers knows of the model at `source`, a resolved path or hub id, without its weights.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if source.endswith((".gguf", ".npz")):
        raise ValueError(f"{source} has no configuration beside its weights; give a folder with a config.json, or a size as 7b")
    return _config(source, arguments_for(config, None, source))


def label_names(config: ModelConfig) -> tuple[str, ...] | None:
    """The labels of a checkpoint's trained head for classification, in its order; None where it has none.

    Raises:
        ValueError: there is no such model.
    """
    source = resolve(config.path)
    if source.endswith((".npz", ".gguf")):
        return None
    found = _config(source, arguments_for(config, None, source))
    trained = any(str(name).endswith(CLASSIFIER) for name in found.architectures or ())
    return tuple(str(found.id2label[i]) for i in range(len(found.id2label))) if trained else None


def _quant_method(config: Any) -> str | None:
    """What the config says about quantization, as a word; None where it says nothing."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return str(found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None))


def _refuse_adapter(source: str) -> None:
    if (Path(source) / "adapter_config.json").is_file():
        raise ValueError("it holds an adapter (adapter_config.json); merge that into its base model first")


def _refuse_far_sizes(config: Any, files: dict[str, checkpoint.Stored]) -> None:
    """Raise ValueError for damaged sizes, for which transformers would allocate memory, or build layers, without end."""
    if not files:
        return
    text = config.get_text_config()
    refuse_depth({"num_hidden_layers": getattr(text, "num_hidden_layers", 0)}, len(files))
    longest = max((max(found.shape, default=1) for found in files.values()), default=1)
    for key in ("vocab_size", "hidden_size", "intermediate_size"):
        value = getattr(text, key, 0)
        if isinstance(value, int) and value > _FAR * longest:
            raise ValueError(f"config.json has {key}={value}, but no weight is longer than {longest}")


def _check_finite(model: torch.nn.Module, source: str) -> None:
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            raise ValueError(f"{source}: the weight {name} has NaN or infinite values; the checkpoint is damaged")


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
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ValueError(f"the model's config has max_position_embeddings={most!r}, which is no number of tokens")
    return most


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
