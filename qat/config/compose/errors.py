"""Errors of Hydra, OmegaConf and YAML in one line."""

from __future__ import annotations


def first_lines(error: Exception) -> str:
    """What a person needs of an error of Hydra, OmegaConf or YAML, on one line."""
    text = f"{error}\n{error.__cause__ or ''}".partition("Config search path")[0]
    lines = [line.strip() for line in text.splitlines()]
    said = " ".join(line for line in lines if line and not line.startswith(("full_key", "reference_type", "object_type")))
    key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    return f"{said} (key {key})" if key and key not in said else said
