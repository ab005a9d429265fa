"""The words of the command line: its settings, and the flags beside them."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import NoReturn

from qat.config.compose.keys import check_keys
from qat.config.flags import heard
from qat.config.run import AUTO

FLAGS = "--help [GROUP], --dry-run, -v, -m (one run for each of key=a,b), --cfg job, --info, --config-dir DIR"
"""Of those that Hydra has, the ones that serve here."""

_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command line: its settings, and the flags that stood before, between or after them."""

    settings: list[str]
    multirun: bool = False
    config_dir: str | None = None
    flags: tuple[str, ...] = ()
    """Flags that Hydra itself serves, such as --cfg job."""

    @property
    def resume(self) -> str | None:
        """The folder of the run to continue, whose configuration is meant; `auto` goes with one of the command line."""
        found = [setting.partition("=")[2] for setting in self.settings if setting.startswith("resume=")]
        return _unquoted(found[-1]) if found and found[-1] not in ("null", AUTO) else None

    @property
    def by_hydra(self) -> bool:
        """Whether Hydra's own main is asked for: its flags, or its settings (another sweeper or launcher)."""
        return bool(self.flags) or any(setting.lstrip("+~").startswith(("hydra.", "hydra/")) for setting in self.settings)


def sweep_folder(settings: list[str]) -> tuple[str | None, list[str]]:
    """The folder that the jobs of a sweep lie in, and what says so where no setting does; None: each job has its own."""
    said = {key.lstrip("+"): value for key, _, value in (one.partition("=") for one in settings)}
    if "run.dir" not in said:
        folder = f"runs/{said.get('recipe', 'custom')}/{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        return folder, [f"run.dir={folder}"]
    folder = _unquoted(said["run.dir"])
    return (None if "${" in folder or "," in folder else folder), []


def _unquoted(value: str) -> str:
    """One pair of quotes around all of it goes, as Hydra would have it."""
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if _QUOTED.fullmatch(value) else value


def parse(arguments: list[str]) -> Command:
    """The command line in parts, its keys checked.

    Raises:
        ValueError: a flag or a key that is none, or flags that do not go with each other.
    """
    arguments = ["dry_run=true" if argument == "--dry-run" else argument for argument in heard(arguments)]
    command = _without_flags(arguments) if any(argument.startswith("-") for argument in arguments) else Command(arguments)
    for setting in command.settings:
        if "=" not in setting.lstrip("+")[1:] and not setting.startswith("~"):
            raise ValueError(f"{setting!r} is no setting; settings are key=value (python -m qat.train --help)")
    check_keys(command.settings)
    _check_resume(command)
    return command


def _check_resume(command: Command) -> None:
    if command.resume is None:
        return
    if not command.resume:
        raise ValueError("resume= names no folder; it must be that of a run, as resume=runs/NAME/TIME")
    flags = ["-m"] * command.multirun + ["--config-dir"] * bool(command.config_dir) + list(command.flags)
    if flags:
        why = "which continues one run; allowed beside it are settings as key=value"
        raise ValueError(f"{flags[0]} does not go with resume=, {why}")


def _without_flags(arguments: list[str]) -> Command:
    """Hydra's own parser says what is a flag; its answer to a wrong one is a page of usage, ours a line."""
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        settings = [flag.lstrip("-") for flag in arguments if flag.startswith("-") and "=" in flag]
        hint = f"; settings have no dashes: {settings[0]}" if settings else ""
        raise ValueError(f"{message}{hint}. Allowed: {FLAGS}, and settings as key=value (python -m qat.train --help)")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    found = parser.parse_intermixed_args(arguments)
    flags = list(arguments)
    for setting in found.overrides:
        flags.remove(setting)
    rest = [flag for flag in flags if flag not in ("-m", "--multirun")] if found.multirun else flags
    if found.config_dir and _only_config_dir(rest):
        rest = []
    return Command(list(found.overrides), bool(found.multirun), found.config_dir, tuple(rest))


def _only_config_dir(flags: list[str]) -> bool:
    return len(flags) <= 2 and flags[0].partition("=")[0] in ("--config-dir", "-cd")
