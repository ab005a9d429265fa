"""The sections of a run's page, in their order. One without data is a line that says why, or is left out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from qat.reporting.page import reproduce
from qat.reporting.page.charts import held_out_figures, loss_figure, perplexity_figure, small_figures
from qat.reporting.page.health import damage_section, health_section, latents_section
from qat.reporting.page.parts import Block, Cell, Command, Lines, Section, Table, Texts, megabytes, name_cell, seconds_in_words
from qat.reporting.page.reading import Run
from qat.reporting.result import Stages
from qat.reporting.table import STAGES
from qat.tasks import TASKS


def sections(run: Run) -> list[Section]:
    """All of them, without those that have nothing to say."""
    made = [_made(key, title, build, run) for key, title, build in ORDER]
    return [section for section in made if section.blocks or section.absent]


def _made(key: str, title: str, build: Callable[[Run], Section], run: Run) -> Section:
    """A section; where a file holds something else than what it is made of, a line in place of it."""
    try:
        return build(run)
    except (AttributeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        return Section(key, title, [], f"This could not be shown: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _alarms(run: Run) -> Section:
    lasting = [alarm.line for alarm in run.alarms if alarm.until is None]
    over = [f"{alarm.line} (over at step {alarm.until:,})" for alarm in run.alarms if alarm.until is not None]
    blocks: list[Block] = [Lines(_cut(lines), tone) for lines, tone in ((lasting, "warn"), (over, "")) if lines]
    blocks += [Lines([f"Not readable: {words}" for words in run.damaged], "bad")] if run.damaged else []
    return Section("alarms", "Alarms", blocks)


def _cut(lines: list[str], most: int = 20) -> list[str]:
    """The first, and how many more there are."""
    return [*lines[:most], f"and {len(lines) - most} more"] if len(lines) > most else lines


def _result(run: Run) -> Section:
    measured = run.result.measured
    if not measured:
        return Section("result", "Result", [], "Nothing was measured yet.")
    texts = [measured, *run.result.further.values()]
    rows = [
        [name_cell(label), *(_value(text, key) for text in texts)]
        for key, label in STAGES.items()
        if any(key in text for text in texts)
    ]
    table = Table(["model", *(text.title.replace("\n", ", ") for text in texts)], rows, measured.words)
    sizes = _sizes(run)
    weights = [Lines([f"The weights are {run.result.weights}."])] if run.result.weights else []
    return Section("result", "Result", [table, *weights, *([sizes] if sizes else [])])


def _value(text: Stages, key: str) -> Cell:
    """A value with its distance from full precision, and a bar of ln or of the share."""
    if key not in text:
        return Cell("")
    value, full = text[key], text.get("full_precision")
    if not isinstance(value, int | float) or not math.isfinite(value):
        return Cell("not finite", tone="bad")
    if full is None or key == "full_precision" or not math.isfinite(full):
        return Cell(text.shown(value))
    if text.measure != "perplexity":
        return Cell(text.shown(value), f"{100 * (value - full):+.2f} points")
    if min(value, full) <= 0:
        return Cell(text.shown(value))
    lost = math.log(value / full)
    return Cell(text.shown(value), f"{math.expm1(lost):+,.1%} · ln {lost:+.3f}" if lost < 3 else f"×{value / full:,.0f}")


def _sizes(run: Run) -> Table | None:
    sizes = {key: size for key, size in run.result.bytes.items() if isinstance(size, int | float)}
    whole, linears = sizes.get("full_precision_bf16"), sizes.get("linears_bf16")
    if not whole:
        return None
    rows = []
    for key, words, base in (
        ("full_precision_bf16", "whole model, bf16", whole),
        ("packed_model", "whole model, packed", whole),
        ("linears_bf16", "its linear layers, bf16", linears),
        ("packed_linears", "its linear layers, packed", linears),
    ):
        if key in sizes and base:
            rows.append(_size(words, sizes[key], base, whole))
    known = {"full_precision_bf16", "packed_model", "linears_bf16", "packed_linears"}
    rows += [_size(f"export {key}", size, whole, whole) for key, size in sizes.items() if key not in known]
    return Table(["size", "", "of bf16"], rows)


def _size(words: str, size: float, base: float, whole: float) -> list[Cell]:
    share = Cell(f"{size / base:.1%}", "" if size == base else f"{base / size:.1f} times smaller" if size else "")
    return [name_cell(words), Cell(megabytes(size), bar=min(1.0, size / whole)), share]


def _curves(run: Run) -> Section:
    found = [figure for figure in (loss_figure(run), perplexity_figure(run)) if figure] + held_out_figures(run)
    absent = "No step was logged: the run ended before step trainer.log_every_n_steps."
    section = Section("curves", "Loss and perplexity", found, "" if found else absent)
    return section


def _optimization(run: Run) -> Section:
    return Section("optimization", "Optimization", small_figures(run, "optim"))


def _samples(run: Run) -> Section:
    stages = {key: texts for key, texts in (run.samples.get("stages") or {}).items() if isinstance(texts, list)}
    if not stages:
        writes = TASKS[run.get("task", "language")].generates
        return Section(
            "samples", "Samples", [], "No texts were kept (trainer.samples=0, or an earlier version)." if writes else ""
        )
    prompts = [str(text) for text in run.samples.get("prompts") or []]
    names = [key for key in STAGES if key in stages]
    rows = [(prompt, [_continuation(stages[key], i, prompt) for key in names]) for i, prompt in enumerate(prompts[:8])]
    about = "The same prompts of held-out text, continued greedily at each stage."
    return Section("samples", "Samples", [Texts([STAGES[key] for key in names], rows)], about=about)


def _continuation(texts: Sequence[object], i: int, prompt: str) -> str:
    """What follows the prompt; a model that writes empty lines without end does not push the page away."""
    text = str(texts[i]) if i < len(texts) else ""
    return re.sub(r"\n\s*\n\s*", "\n\n", text.removeprefix(prompt)[:1500]).strip()


def _speed(run: Run) -> Section:
    result, rows = run.result, []
    facts = [
        ("tokens a second, mean", f"{result.tokens_per_second:,.0f}" if result.tokens_per_second else ""),
        ("training", seconds_in_words(result.seconds) if result.seconds else ""),
        ("from first to last", seconds_in_words(result.seconds_total) if result.seconds_total else ""),
    ]
    rows = [[name_cell(name), Cell(value)] for name, value in facts if value]
    figures = small_figures(run, "speed")
    if not figures and "train/tokens_per_second" in run.metrics:
        figures = [f for f in small_figures(run, "train") if f.title == "tokens per second"]
    return Section("speed", "Speed and memory", [*([Table(["", ""], rows)] if rows else []), *figures])


def _data(run: Run) -> Section:
    tokens = run.result.tokens
    rows = [
        ("kind", run.get("data.kind")),
        ("training text", run.get("data.train")),
        ("held-out text", run.get("data.valid") or f"{run.get('data.valid_fraction', 0):.0%} of the training text"),
        ("tokens trained on", f"{tokens:,}" if tokens else None),
        ("tokens a step", _tokens_a_step(run)),
        ("passes over the text", f"{passes:.2f}" if (passes := run.last("train/epoch")) is not None else None),
        *((key.replace("_", " "), value) for key, value in run.result.calibration.items() if not isinstance(value, dict | list)),
    ]
    found = run.result.data
    rows += [row for kind in ("training", "validation") for row in _accounted(kind, found.get(kind) or {})]
    notes = [Lines([str(note) for note in found["notes"]], "warn")] if found.get("notes") else []
    table = Table(["", ""], [[name_cell(k), name_cell(str(v))] for k, v in rows if v is not None])
    return Section("data", "Data", [table, *notes])


_ACCOUNTS = {
    "sequences": "sequences of {kind}",
    "tokens": "tokens of {kind}",
    "left_over_tokens": "left over at the end of {kind}, tokens",
    "cut": "cut to the sequence length, of {kind}",
    "dropped": "dropped, of {kind}",
}


def _accounted(kind: str, found: dict[str, Any]) -> list[tuple[str, Any]]:
    """What there was of a part, and what of it was not used; of a mixture each part's."""
    rows = [(words.format(kind=kind), f"{found[key]:,}") for key, words in _ACCOUNTS.items() if key in found]
    parts = found.get("parts") or []
    return [*rows, *(row for i, one in enumerate(parts) for row in _accounted(f"{kind}, part {i + 1}", one))]


def _tokens_a_step(run: Run) -> str | None:
    parts = [run.get(key) for key in ("data.batch_size", "trainer.accumulate_grad_batches", "data.sequence_length")]
    if not all(isinstance(part, int) for part in parts):
        return None
    return f"{math.prod(parts):,} ({' × '.join(str(part) for part in parts if part != 1)})"


def _layers(run: Run) -> Section:
    conversion = run.result.conversion
    if "summary" not in conversion:
        return Section("layers", "Layers")
    skipped = conversion.get("skipped") or {}
    rows = [[name_cell(str(name)), name_cell(str(reason))] for name, reason in skipped.items()]
    return Section(
        "layers", "Layers", [Lines([str(conversion["summary"])]), *([Table(["not converted", "why"], rows)] if rows else [])]
    )


def _verification(run: Run) -> Section:
    found, export = run.result.verification, run.result.export
    blocks: list[Block] = []
    if lines := [str(line) for line in found.get("summary", [])]:
        blocks.append(Lines(lines, "good"))
    if skipped := [f"export {name} was skipped: {why}" for name, why in (export.get("skipped") or {}).items()]:
        blocks.append(Lines(skipped, "warn"))
    return Section("verification", "Verification", blocks, "" if blocks else "Nothing was verified: the run did not come so far.")


def _reproduce(run: Run) -> Section:
    recipe, found = reproduce.differences(run)
    rows = [[name_cell(key), name_cell(_short(old)), name_cell(_short(new))] for key, (old, new) in found.items()]
    head = ["key", f"recipe {recipe}" if recipe else "default", "this run"]
    facts = {
        "commit": run.starts[0].get("commit") if run.starts else None,
        **run.result.versions,
        "config": run.result.config_hash,
    }
    versions = ", ".join(f"{name} {value}" for name, value in facts.items() if value)
    blocks: list[Block] = [Command("from the folder it was started in", reproduce.command(run))]
    blocks += (
        [Table(head, rows)]
        if rows
        else [Lines([f"Every key is as in the recipe {recipe}." if recipe else "Every key is the default."])]
    )
    return Section("reproduce", "How to reproduce", [*blocks, *([Lines([versions])] if versions else [])])


def _short(value: object) -> str:
    text = reproduce.setting(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _next(run: Run) -> Section:
    return Section("next", "Next", [Command(words, text) for words, text in reproduce.next_commands(run)])


ORDER: tuple[tuple[str, str, Callable[[Run], Section]], ...] = (
    ("alarms", "Alarms", _alarms),
    ("result", "Result", _result),
    ("curves", "Loss and perplexity", _curves),
    ("health", "Quantization health", health_section),
    ("latents", "Latent weights, before and after", latents_section),
    ("damage", "Damage map", damage_section),
    ("samples", "Samples", _samples),
    ("optimization", "Optimization", _optimization),
    ("speed", "Speed and memory", _speed),
    ("data", "Data", _data),
    ("layers", "Layers", _layers),
    ("verification", "Verification", _verification),
    ("reproduce", "How to reproduce", _reproduce),
    ("next", "Next", _next),
)
"""The sections from the top of the page to its end, and what is said where one cannot be made."""
