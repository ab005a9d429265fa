"""The job of `python -m qat.export`: a run's packed model in another format, read back and proved equal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.formats import FORMATS, get_format
from qat.models.any import packed_folder
from qat.models.heads import refuse_classifier
from qat.storage import local, parse_json
from qat.targets import format_for
from qat.terminal.stage import stage

if TYPE_CHECKING:
    from qat.metrics.perplexity import Window

_PROBES = 4
_PROBE_LENGTH = 64


def export(
    run: str,
    out: str,
    *,
    format: str | None = None,
    text: str = "pydoc_data.topics",
    max_tokens: int = 16_384,
    trust_remote_code: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Write the packed model of `run` to `out`, and read it back with the format's stock reader.

    Args:
        run: a run folder (its `packed/` is used) or a packed folder.
        out: a folder, or a file for gguf and pt2; an earlier export is replaced; it appears only when what was read is equal.
        format: of `qat.targets.FORMATS`; None: the one that the suffix of `out` says, hf for a folder.
        text: a file or `pydoc_data.topics`; perplexity is compared on its first `max_tokens` tokens.
        trust_remote_code: whether Python code in the packed folder may run.
        options: keywords of the format's `save`; None is the format's default.

    Returns:
        what the format's `save` returned (with "verification"), "replaced": whether something was there, and "sizes".

    Raises:
        ValueError: `run` is no such folder, the format cannot hold the model or lacks an option, or what was read back differs.
    """
    format, given = chosen(out, format, options)
    folder = packed_folder(run)
    from qat.config import ModelConfig
    from qat.formats.packed import folder as packed
    from qat.models.hub import load_tokenizer

    with stage(f"loading {folder}"):
        model = packed.load(folder, trust_remote_code=trust_remote_code)
    refuse_classifier(model, run)
    tokenizer = load_tokenizer(ModelConfig(path=str(folder), trust_remote_code=trust_remote_code))
    windows = text_windows(model, tokenizer, text, max_tokens)
    facts = {**packed.read_extra(folder).get("card", {}), **_results(Path(run))}
    about = f"the first {max_tokens:,} tokens of {Path(text).name}"
    return {**write(model, out, tokenizer, format, given, windows, facts), "text": about, "sizes": packed.sizes(folder)}


def write(
    model: Any, out: str, tokenizer: Any, format: str, given: dict[str, Any], windows: list[Window], facts: dict[str, Any]
) -> dict[str, Any]:
    """Write a packed model and compare what is read back on `windows`; `facts` are for the model card."""
    from qat.formats.dtypes import round_floats

    writer = get_format(format)
    for name in (name for name in given if FORMATS[format].options[name].rounds):
        round_floats(model, given[name])
    probes = windows[0][0][:_PROBES, :_PROBE_LENGTH]
    replaced = local(out).exists()
    with stage(f"writing {out} and reading it back"):
        info = writer.save(
            model, out, tokenizer, **given, card=facts, check=lambda new: writer.read_back(new, model, probes, windows)
        )
    return {**info, "format": format, "replaced": replaced}


def chosen(out: str, format: str | None, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The format for a target and the options that were given; ValueError where they do not fit."""
    format = format_for(out, format)
    given = {key: value for key, value in options.items() if value is not None}
    _check_options(format, given)
    return format, given


def _check_options(format: str, given: dict[str, Any]) -> None:
    """ValueError for an option of another format, or a value that is not allowed."""
    for name, value in given.items():
        flag, option = f"--{name.replace('_', '-')}", FORMATS[format].options.get(name)
        if option is None:
            owners = [other for other, record in FORMATS.items() if name in record.options]
            raise ValueError(f"{flag} does not fit --format {format}, only {', '.join(owners) or 'no format'}")
        if option.allowed and value not in option.allowed:
            raise ValueError(f"{flag}={value!r} is not allowed for {format}; choose one of {', '.join(option.allowed)}")


def text_windows(model: Any, tokenizer: Any, text: str, max_tokens: int) -> list[Window]:
    """What perplexity is measured on."""
    from qat.config import DataConfig
    from qat.data import text_tokens
    from qat.evaluation.context import window_context
    from qat.metrics.perplexity import windows

    return list(windows(text_tokens(text, tokenizer, DataConfig(), max_tokens), window_context(model)))


def _results(run: Path) -> dict[str, Any]:
    """For the card: the perplexities in the run's result.json, where there is one."""
    try:
        return {"results": parse_json((run / "result.json").read_text(encoding="utf-8"))["perplexity"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def report(info: dict[str, Any]) -> list[str]:
    """What a person reads of `export`'s result."""
    sizes = info["sizes"]
    return [
        *info.get("calibrated", []),
        *(get_format(info["format"]).report(info) if info["format"] in FORMATS else []),
        *(["the earlier export there is replaced"] if info["replaced"] else []),
        f"bytes: {sizes['full_precision_bf16']:,} in bf16, {sizes['packed_model']:,} packed"
        f" (of which {sizes['packed_linears']:,} the quantized layers)",
    ]
