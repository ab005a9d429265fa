"""python -m qat.train recipe=NAME key=value: the main job, from a pretrained model to verified, packed, exported weights.

`run(TrainConfig) -> RunResult` is a plain function (`qat.training.run`, readable top to bottom); `main` is Hydra only. Heavy
imports are inside functions, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from qat.config import TrainConfig

if TYPE_CHECKING:
    from qat.reporting.result import RunResult


def run(config: TrainConfig) -> RunResult:
    """Load, convert, train, verify, pack and export (`qat.training.run`); everything measured is in the result and the folder.

    Raises:
        ValueError: a configuration, file, model or value that cannot work; the message says what, where and what is allowed.
    """
    from qat.training.run import run as main_job

    return main_job(load_config(config.resume) if config.resume and not config.model.path else config)


def load_config(folder: str, overrides: list[str] | None = None) -> TrainConfig:
    """The configuration of an earlier run, to continue it; `overrides` are key=value.

    Raises:
        ValueError: the folder holds no run, or an override names no key.
    """
    from pathlib import Path

    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = Path(folder) / "config.yaml"
    if not file.is_file():
        raise ValueError(f"resume={folder}: there is no run, {file} is missing")
    try:
        saved = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(file), OmegaConf.from_dotlist(overrides or []))
        saved.resume = folder
        return OmegaConf.to_object(saved)  # type: ignore[return-value]
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"resume={folder}: {file.name} or an override is damaged: {_first_lines(error)}") from error


def _task(composed: Any) -> None:
    """One job of Hydra: from its composed config to a printed table."""
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    def build() -> TrainConfig:
        config: TrainConfig = OmegaConf.to_object(composed)  # type: ignore[assignment]
        job = HydraConfig.get()
        if job.mode == RunMode.MULTIRUN and config.run.dir:
            config.run.dir = str(Path(config.run.dir) / str(job.job.num))
        return config

    _show(build)


def _show(build: Any) -> None:
    """Run, print the table, and turn errors that are the user's into one line and an exit code."""
    from omegaconf.errors import OmegaConfBaseException

    from qat.reporting.result import print_table

    try:
        result = run(build())
    except (ValueError, OSError) as error:
        _exit(error)
    except OmegaConfBaseException as error:
        _exit(_first_lines(error))
    if result.perplexity:
        print_table(result)
    if result.status.startswith("interrupted"):
        sys.exit(130)


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


def _help() -> str:
    """Hydra's own help composes everything first, which takes more than a second."""
    from qat.config.compose.keys import options

    return HELP + "\n".join(f"  {group + '=':<11}{', '.join(names)}" for group, names in options().items())


def _check_flags(arguments: list[str]) -> None:
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


def _check_composition(folder: str, arguments: list[str]) -> None:
    """Compose once before Hydra does: its own report of a wrong choice or type is a page. Sweeps are left to it."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if any(argument.startswith("-") for argument in arguments):
        return
    try:
        with initialize_config_dir(folder, version_base="1.3"):
            compose("train", arguments, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        _exit(_first_lines(error))


def _first_lines(error: Exception) -> str:
    """What a person needs of an error of Hydra, OmegaConf or YAML, on one line."""
    text = f"{error}\n{error.__cause__ or ''}".partition("Config search path")[0]
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("full_key", "reference_type", "object_type")))


def _exit(error: object) -> NoReturn:
    print(f"qat.train: {error}", file=sys.stderr)
    sys.exit(2)


def main(arguments: list[str] | None = None) -> None:
    """The command line. `--dry-run` is short for dry_run=true; resume=DIR takes the configuration of that run."""
    from qat.config.compose.keys import check_keys, config_folder

    # libgomp's threads spin while they wait: beside any other work on the machine that is ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = ["dry_run=true" if a == "--dry-run" else a for a in (sys.argv[1:] if arguments is None else arguments)]
    if {"-h", "--help"} & set(arguments):
        return print(_help())
    try:
        _check_flags(arguments)
        check_keys(arguments)
    except ValueError as error:
        _exit(error)
    resume = [a.partition("=")[2] for a in arguments if a.startswith("resume=")]
    if resume:
        overrides = [a for a in arguments if not a.startswith("resume=")]
        if flags := [a for a in overrides if a.startswith("-")]:
            _exit(f"{flags[0]} does not go with resume=, which continues one run; allowed beside it are settings as key=value")
        return _show(lambda: load_config(resume[-1], overrides))

    import hydra

    from qat.config.compose.register import register

    register()
    folder = str(config_folder("conf"))
    _check_composition(folder, arguments)
    sys.argv = [sys.argv[0], *arguments]
    hydra.main(config_path=folder, config_name="train", version_base="1.3")(_task)()


if __name__ == "__main__":
    main()
