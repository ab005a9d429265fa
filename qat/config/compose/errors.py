"""Errors of Hydra, OmegaConf and YAML in one line."""

from __future__ import annotations


def first_lines(error: Exception) -> str:
    """What a person needs of an error of Hydra, OmegaConf or YAML, on one line."""
    text = f"{error}\n{error.__cause__ or ''}".partition("Config search path")[0]
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("full_key", "reference_type", "object_type")))
