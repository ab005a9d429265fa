"""What a person reads of an evaluation."""

from __future__ import annotations

import statistics
from typing import Any

_WORST_LAYERS = 10


def lines(result: dict[str, Any]) -> list[str]:
    """What a person reads of `evaluate`'s result."""
    text = [f"{result['model']}: {result['kind']}"]
    if "perplexity" in result:
        text.append(
            f"perplexity {result['perplexity']:.6g} on {result['text']} ({result['tokens']} tokens,"
            f" context {result['context']}, stride {result['stride']})"
        )
    if "remark" in result:
        text.append(result["remark"])
    if "teacher" in result:
        text += _teacher_lines(result["teacher"])
    for sample in result.get("samples", ()):
        text += ["", f"prompt: {sample['prompt']!r}", f"model:   {sample['continuation']!r}"]
        text += [f"teacher: {sample['teacher']!r}"] if "teacher" in sample else []
    for name, metrics in result.get("tasks", {}).items():
        text.append(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
    return text


def _teacher_lines(teacher: dict[str, Any]) -> list[str]:
    text = [
        f"teacher {teacher['model']}: {teacher['kind']}, perplexity {teacher['perplexity']:.6g};"
        f" KL {teacher['kl']:.4g} nats a token, top-1 agreement {teacher['top1']:.1%}"
    ]
    errors = teacher.get("layers")
    if errors:
        local = sorted(errors, key=lambda name: -errors[name]["local"])
        middle = [statistics.median(error[kind] for error in errors.values()) for kind in ("local", "accumulated")]
        text.append(
            f"relative error of {len(errors)} layers: median {middle[0]:.3f} local, {middle[1]:.3f} accumulated; largest local:"
        )
        text += [
            f"  {name}: {errors[name]['local']:.3f} local, {errors[name]['accumulated']:.3f} accumulated"
            for name in local[:_WORST_LAYERS]
        ]
    return text
