"""The phases of a training, as its configuration and the record of its starts tell them, drawn behind its curves."""

from __future__ import annotations

from typing import Any

from qat.reporting.page.reading import Run


def phases(run: Run) -> list[tuple[str, float, float]]:
    """(name, first step, last step) of what is on for a part of the run."""
    steps = run.get("trainer.max_steps") or 0
    seen = _length(run)
    found = [
        ("warm-up", 0, run.get("optim.warmup_steps") or round(_share(run, "optim.warmup_share", 0.0) * steps)),
        ("quantization blended in", 0, run.get("optim.lambda_steps") or 0),
        ("norms blended in", 0, run.get("optim.rms_norm_steps") or 0),
        ("kl", _share(run, "distill.kl_from", 0.0) * steps, _share(run, "distill.kl_until", 1.0) * steps),
        ("hidden", 0, _share(run, "distill.hidden_until", 1.0) * steps),
    ]
    if run.get("optim.anneal", "none") != "none":
        found.append(("soft codes", 0, (run.get("optim.anneal_share") or 0) * steps))
    there = [(name, start, end) for name, start, end in found if start < end and (start > 0 or end < steps)]
    return [(name, start, min(end, seen)) for name, start, end in there if start < seen]


def _length(run: Run) -> float:
    """Steps that are drawn: of a run that has not ended those that it has made."""
    return run.step if run.step and not run.done else run.get("trainer.max_steps") or 0


def _share(run: Run, key: str, usual: float) -> float:
    value = run.get(key)
    return value if isinstance(value, int | float) else usual


def resumes(run: Run) -> list[tuple[int, str]]:
    """(step, what changed) of each start but the first."""
    changes = {one.get("step"): ", ".join(one.get("changes") or {}) for one in run.changes}
    starts = [one["step"] for one in run.starts[1:] if isinstance(one.get("step"), int)]
    steps = sorted({*starts, *(step for step in changes if isinstance(step, int))})
    return [(step, changes.get(step, "")) for step in steps]


def marks(run: Run) -> dict[str, Any]:
    """Shapes and annotations of a figure over steps."""
    shapes: list[dict[str, Any]] = []
    words: list[dict[str, Any]] = []
    for row, (name, start, end) in enumerate(phases(run)):
        where = {"xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
        shapes.append({"type": "rect", "x0": start, "x1": end, **where, "fillcolor": "--phase", "line": {"width": 0}})
        words.append(_words(name, end, 1 - 0.07 * row, "right" if end > _length(run) / 3 else "left"))
    for step, changed in resumes(run):
        where = {"xref": "x", "yref": "paper", "y0": 0, "y1": 1}
        shapes.append(
            {"type": "line", "x0": step, "x1": step, **where, "line": {"color": "--orange", "width": 1, "dash": "dash"}}
        )
        words.append(_words("resumed" + (f": {changed}" if changed else ""), step, 0.06, "left"))
    return {"shapes": shapes, "annotations": words} if shapes else {}


def _words(text: str, x: float, y: float, anchor: str) -> dict[str, Any]:
    place = {"xref": "x", "yref": "paper", "x": x, "y": y, "xanchor": anchor, "yanchor": "top", "showarrow": False}
    return {**place, "text": text, "font": {"size": 11, "color": "--muted"}, "bgcolor": "--card", "opacity": 0.85}
