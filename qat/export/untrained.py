"""The job of `python -m qat.export MODEL --ptq`: a pretrained model quantized on a text without training, proved, exported.

The codes and scales are those of `qat.calibration.compensation`. What is written is compared as for a trained run: our own
folder is read back and gives the packed model's logits to the bit, and the format's stock reader is compared with it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qat.export.job import chosen, text_windows, write
from qat.formats import get_format
from qat.storage import local
from qat.targets import refuse_file_name
from qat.terminal.stage import stage, tracked

if TYPE_CHECKING:
    from torch import Tensor

    from qat.config import ModelConfig, QuantConfig
    from qat.metrics.perplexity import Window

PACKED = "packed"
TOKENS = 24 * 512
HELD_OUT = 10
"""The last tenth of the calibration text is what perplexity is measured on, where no other text is given."""
MOST = 256
"""Of a long text, so many times what is calibrated on is read."""


def export_untrained(
    model: str,
    out: str,
    *,
    calibration: str | None,
    settings: Sequence[str] = (),
    calibration_tokens: int | None = None,
    format: str | None = None,
    text: str | None = None,
    max_tokens: int = 16_384,
    trust_remote_code: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Quantize `model` on a text, without training, and write it to `out` as `qat.export.job.export` writes a run.

    Args:
        model: a pretrained model in full precision, in any form that a run takes.
        out: a folder, or a file for gguf and pt2.
        calibration: a text like those that the model will see.
        settings: `granularity=channel` or `quant.granularity=channel`, and so on; `model.include=[...]`, `model.exclude=[...]`.
        calibration_tokens: how many, in windows spread over the text; default 12,288.
        format: of `qat.targets.FORMATS`, or `packed`; None: as the suffix of `out` says.
        text: perplexity is measured on its first `max_tokens` tokens; None: on the calibration text's last tenth, held out.
        options: keywords of the format's `save`; None is the format's default.

    Returns:
        what `export` returns, and "calibrated": lines for people, "perplexity": of full precision, converted, calibrated.

    Raises:
        ValueError: settings, a text or a model that cannot be, or a format that cannot hold the model; before anything is
            calibrated. Or what was read back differs.
    """
    format, given = (PACKED, _no_options(out, options)) if format == PACKED else chosen(out, format, options)
    source, quant = _configured(model, settings, trust_remote_code)
    work = _prepare(source, quant, _Texts(calibration, calibration_tokens or TOKENS, text, max_tokens))
    if format != PACKED and (reason := get_format(format).unsupported(work.converted, work.tokenizer, **given)):
        raise ValueError(f"the format {format} cannot hold this model: {reason}")
    return _write(source, work, out, format, given)


@dataclass(frozen=True)
class _Texts:
    calibration: str | None
    tokens: int
    text: str | None
    most: int

    def windows(self, model: Any, tokenizer: Any) -> tuple[list[Tensor], list[Window], str]:
        """What to calibrate on, int64 [B, T] each; what to measure; and that in words."""
        from qat.calibration.windows import windows_of
        from qat.config import DataConfig
        from qat.data import text_tokens
        from qat.evaluation.context import window_context
        from qat.metrics.perplexity import windows

        if self.calibration is None:
            raise ValueError("--ptq needs a text: --calibration FILE")
        context, name = window_context(model), Path(self.calibration).name
        wanted = -(-self.tokens // context)
        found = text_tokens(self.calibration, tokenizer, DataConfig(), MOST * wanted * context)
        kept = len(found) if self.text else len(found) - len(found) // HELD_OUT
        if self.tokens < 1 or kept < wanted * context:
            held = "" if self.text else f", of which the last {len(found) - kept:,} are held out"
            raise ValueError(
                f"--calibration {name} has {len(found):,} tokens{held}: too few for {wanted} windows of {context};"
                f" give a longer text, or --calibration-tokens in 1 to {kept // context * context}"
            )
        chosen = windows_of(found[:kept], context, wanted)
        if self.text is not None:
            about = f"the first {self.most:,} tokens of {Path(self.text).name}"
            return chosen, text_windows(model, tokenizer, self.text, self.most), about
        rest = found[kept:][: self.most]
        return chosen, list(windows(rest, context)), f"{len(rest):,} held-out tokens of {name}"


@dataclass
class _Work:
    """What was made ready."""

    base: Any
    tokenizer: Any
    student: Any
    record: Any
    converted: Any
    """Packed with the codes of the weights themselves."""
    windows: list[Tensor]
    scored: list[Window]
    about: str


def _configured(model: str, settings: Sequence[str], trust: bool) -> tuple[ModelConfig, QuantConfig]:
    """The sections that settings say; ValueError for other keys, and for a quantizer that is not calibrated."""
    from qat.calibration.compensation import check_calibrated
    from qat.config import ModelConfig
    from qat.config.compose.composing import compose_run
    from qat.config.compose.text import as_typed

    named = [one if "." in one.partition("=")[0] else f"quant.{one}" for one in settings]
    for given, full in zip(settings, named, strict=True):
        if not full.startswith(("quant.", "model.include=", "model.exclude=")) or "=" not in full:
            raise ValueError(
                f"{given} is not allowed with --ptq; allowed are KEY=VALUE of quant, model.include and model.exclude"
            )
    config = compose_run([as_typed(one) for one in named])
    check_calibrated(config.quant)
    chosen = config.model
    return ModelConfig(model, include=chosen.include, exclude=chosen.exclude, trust_remote_code=trust), config.quant


def _prepare(source: ModelConfig, quant: QuantConfig, texts: _Texts) -> _Work:
    from qat.conversion import walker
    from qat.models.hub import check_vocabulary, load_model, load_tokenizer

    if (local(source.path) / PACKED).is_dir():
        raise ValueError(f"{source.path} is a run, whose model is quantized already; export it without --ptq")
    with stage(f"loading {source.path}"):
        tokenizer, base = load_tokenizer(source), load_model(source)
    check_vocabulary(base, tokenizer)
    windows, scored, about = texts.windows(base, tokenizer)
    student = copy.deepcopy(base)
    probe = {"input_ids": windows[0][:1, :32], "use_cache": False}
    include, exclude = source.include or None, source.exclude or None
    with stage("converting"):
        record = walker.convert(student, quant, include=include, exclude=exclude, probe=probe)
        converted = copy.deepcopy(student)
        walker.pack(converted)
    return _Work(base, tokenizer, student, record, converted, windows, scored, about)


def _write(source: ModelConfig, work: _Work, out: str, format: str, given: dict[str, Any]) -> dict[str, Any]:
    """Calibrate, measure, and write."""
    from qat.calibration.compensation import compensate, packing_record
    from qat.formats.packed import folder as packed
    from qat.models.hub import describe_source

    start = {"full precision": work.base, "converted": work.converted}
    values = {name: _perplexity(one, work, name) for name, one in start.items()}
    found = compensate(work.base, work.student, work.windows)
    values["calibrated"] = _perplexity(work.student, work, "calibrated")
    results = {f"perplexity, {name}": round(value, 4) for name, value in values.items()}
    card = {**describe_source(source), "recipe": f"not trained; calibrated on {found.tokens:,} tokens"}
    save = packing_record(work.record, "2bit"), work.tokenizer, {"card": card}
    with TemporaryDirectory() as temporary:
        folder = packed.save(work.student, Path(temporary) / PACKED, *save)
        model = packed.load(folder, trust_remote_code=source.trust_remote_code)
        _refuse_other(model, work.student, work.scored[0][0])
        if format == PACKED:
            info = {"format": format, "replaced": local(out).exists()}
            packed.save(work.student, local(out), *save)
        else:
            facts = {**card, "results": {**results, "text": work.about}}
            info = write(model, out, work.tokenizer, format, given, work.scored, facts)
        sizes = packed.sizes(folder)
    lines = _lines(work, found, values, out if format == PACKED else None)
    return {**info, "text": work.about, "sizes": sizes, "perplexity": values, "calibrated": lines}


def _perplexity(model: Any, work: _Work, name: str) -> float:
    from qat.metrics.perplexity import exp_mean, log_likelihood

    return exp_mean(*log_likelihood(model, tracked(work.scored, f"perplexity, {name}", "batches")))


def _refuse_other(read: Any, written: Any, ids: Tensor) -> None:
    """ValueError unless the folder's model is the one that was written, to the bit."""
    from qat.metrics.perplexity import logits_of

    difference = (logits_of(read, ids) - logits_of(written, ids)).abs().max().item()
    if difference != 0:
        raise ValueError(f"the packed folder, read back, gives other logits, by up to {difference:.3g}; please report this")


def _lines(work: _Work, found: Any, values: dict[str, float], folder: str | None) -> list[str]:
    numbers = ", ".join(f"{value:.4g} {name}" for name, value in values.items())
    notes = {
        "saw a part of the tokens and is fitted to its own inputs": found.alone,
        "saw no token: codes of its weight": found.unseen,
    }
    return [
        work.record.summary(),
        f"calibrated on {found.tokens:,} tokens in {found.seconds:.1f} s, not trained",
        *(f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {why}" for why, names in notes.items() if names),
        f"perplexity on {work.about}: {numbers}",
        *([f"{folder}: packed folder, read back with equal logits"] if folder else []),
    ]


def _no_options(out: str, options: dict[str, Any]) -> dict[str, Any]:
    refuse_file_name(local(out))
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} does not fit --format {PACKED}")
    return {}
