"""Whatever form a model is in, loaded ready to run: for the verbs that take any of them.

A further kind gets its own branch in `load`, and says in `Loaded.kind` what it was found to be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.storage import local

if TYPE_CHECKING:
    from torch import nn


class Loaded(NamedTuple):
    """A model ready to evaluate, its tokenizer, and what it was found to be."""

    model: nn.Module
    tokenizer: Any
    kind: str


def load(path: str, *, trust_remote_code: bool = False) -> Loaded:
    """Find out what `path` is and load it.

    A run folder (its `packed/` is used), a packed folder, a stock bitnet folder, or anything that `qat.models.hub.load_model`
    takes: a folder in full precision, a .gguf file, `package://NAME/FILE`, a hub id.

    Args:
        trust_remote_code: whether Python code that comes with the weights may run.

    Raises:
        ValueError: it cannot be loaded, a stock folder's keys do not fit its model, or it brings code that is not trusted.
    """
    trust = trust_remote_code
    folder = local(path)
    _refuse_missing(path, folder)
    if (folder / "packed").is_dir():  # where it is damaged, loading names the file
        return _load_packed(folder / "packed", f"packed model of the run {folder}", trust)
    if (folder / "result.json").is_file():
        raise ValueError(f"{path} has no packed model: {_status(folder)}")
    if _quant_method(folder) == "qat":
        return _load_packed(folder, "packed model of qat", trust)
    if _quant_method(folder) == "bitnet":
        return _load_stock(folder, trust)
    return _load_full(path, trust)


def packed_folder(run: str) -> Path:
    """The packed folder of a run, or `run` itself where it is one; ValueError otherwise."""
    from qat.formats.packed.folder import is_packed

    folder = local(run)
    if not folder.is_dir():
        raise ValueError(f"RUN={run!r}: there is no such folder")
    inner = folder / "packed"
    if inner.is_dir():
        return inner  # where it is damaged, loading names the file
    if not is_packed(folder):
        raise ValueError(f"RUN={run!r} is neither the folder of a finished run (it has no packed/) nor a packed folder of qat")
    return folder


def _refuse_missing(path: str, folder: Path) -> None:
    """A path that can only be a local one and is not there; a run's export that was not possible is told apart."""
    if folder.exists() or path.startswith("package://"):
        return
    run = folder.parent
    if folder.name == "model" and (run / "result.json").is_file():
        raise ValueError(f"{path} was not written: {_why_skipped(run)}; give the run itself, {run}")
    if path.startswith((".", "/", "~")) or folder.suffix in (".gguf", ".npz"):
        raise ValueError(f"{path}: there is no such file or folder")


def _status(run: Path) -> str:
    try:
        return f"the run is {json.loads((run / 'result.json').read_text(encoding='utf-8'))['status']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"its result.json cannot be read ({error})"


def _why_skipped(run: Path) -> str:
    try:
        skipped = json.loads((run / "result.json").read_text(encoding="utf-8"))["export"]["skipped"]
        return (
            "; ".join(f"{name} cannot hold this model ({why})" for name, why in skipped.items()) or "the run has no such export"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "the run did not get so far"


def _load_packed(folder: Path, kind: str, trust: bool) -> Loaded:
    from qat.formats.packed.folder import load as load_packed

    return Loaded(load_packed(folder, trust_remote_code=trust), _tokenizer(str(folder), trust), kind)


def _load_full(path: str, trust: bool) -> Loaded:
    from qat.config import ModelConfig
    from qat.models.hub import load_model

    kind = "GGUF, weights dequantized to float32 by transformers" if path.endswith(".gguf") else "full precision (float32)"
    return Loaded(load_model(ModelConfig(path=path, trust_remote_code=trust)), _tokenizer(path, trust), kind)


def _load_stock(folder: Path, trust: bool) -> Loaded:
    """With stock transformers, as a user would, but its warnings about keys are errors."""
    from transformers import AutoModelForCausalLM

    from qat.formats import upstream
    from qat.formats.code import check_trust
    from qat.formats.folder import one_line, refuse_report
    from qat.formats.seal import refuse_altered

    reader: Any = AutoModelForCausalLM
    check_trust(folder, _config(folder), trust)
    try:
        upstream.listen()
        model, report = reader.from_pretrained(folder, output_loading_info=True, trust_remote_code=trust)
    except Exception as error:  # transformers raises nearly any class here
        raise ValueError(f"cannot load the model {folder}: {one_line(error)}") from error
    refuse_report(report, folder)
    refuse_altered(folder)
    linear_class = model.config.quantization_config.linear_class
    return Loaded(
        model.eval(), _tokenizer(str(folder), trust), f"stock bitnet folder (linear_class {linear_class}), read by transformers"
    )


def _tokenizer(path: str, trust: bool) -> Any:
    from qat.config import ModelConfig
    from qat.models.hub import load_tokenizer

    return load_tokenizer(ModelConfig(path=path, trust_remote_code=trust))


def _quant_method(folder: Path) -> str | None:
    """What a local folder's config.json says about quantization; None where it says nothing or is not there."""
    try:
        return _config(folder)["quantization_config"]["quant_method"]
    except (KeyError, TypeError):
        return None


def _config(folder: Path) -> dict[str, Any]:
    """config.json of a local folder; empty where it cannot be read, which loading says in its own words."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
