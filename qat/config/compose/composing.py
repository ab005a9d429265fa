"""From arguments to a composed configuration."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from qat.config.compose.errors import first_lines


def check_composition(folder: str, arguments: list[str]) -> None:
    """Compose once before Hydra does: its own report of a wrong choice or type is a page. Sweeps are left to it."""
    if any(argument.startswith("-") for argument in arguments):
        return
    try:
        with initialize_config_dir(folder, version_base="1.3"):
            compose("train", arguments, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(first_lines(error)) from error
