"""The configuration of an earlier run, to continue it."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qat.config.compose.errors import first_lines
from qat.config.run import TrainConfig


def load_config(folder: str, overrides: list[str] | None = None) -> TrainConfig:
    """The configuration of an earlier run, to continue it; `overrides` are key=value.

    Raises:
        ValueError: the folder holds no run, or an override names no key.
    """
    file = Path(folder) / "config.yaml"
    if not file.is_file():
        raise ValueError(f"resume={folder}: there is no run, {file} is missing")
    try:
        saved = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(file), OmegaConf.from_dotlist(overrides or []))
        saved.resume = folder
        return OmegaConf.to_object(saved)  # type: ignore[return-value]
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"resume={folder}: {file.name} or an override is damaged: {first_lines(error)}") from error
