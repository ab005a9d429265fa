"""The words of the command line: help, and the flags beside the settings."""

from __future__ import annotations

from typing import NoReturn

from qat.config.compose.keys import options

FLAGS = "--help, --dry-run, -m (one run for each of key=a,b), --cfg job, --info"
"""Of those that Hydra has, the ones that serve here."""

HELP = """Fine-tune a pretrained model as a ternary or binary BitLinear model.

  python -m qat.train recipe=NAME [key=value ...]    train, verify, pack, export
  python -m qat.train recipe=NAME --dry-run          coverage, memory and tokens; no training
  python -m qat.train resume=runs/NAME/TIME          continue a run exactly
  python -m qat.train -m recipe=NAME key=a,b         one run for each value
  python -m qat.train recipe=NAME --cfg job          all keys with their values (explained in qat/config/)

recipes, and the groups that they and you choose from:
"""


def help_text() -> str:
    """Hydra's own help composes everything first, which takes more than a second."""
    return HELP + "\n".join(f"  {group + '=':<11}{', '.join(names)}" for group, names in options().items())


def check_flags(arguments: list[str]) -> None:
    """Raise ValueError for a flag that Hydra does not have, or has otherwise: its own answer is a page of usage."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    if not flags:
        return
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        settings = [flag.lstrip("-") for flag in flags if "=" in flag]
        hint = f"; settings have no dashes: {settings[0]}" if settings else ""
        raise ValueError(f"{message}{hint}. Allowed: {FLAGS}, and settings as key=value (python -m qat.train --help)")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(arguments)
