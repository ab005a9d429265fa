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
    from qat.config.compose.saved import load_config
    from qat.training.signals import Interrupted, listening

    try:
        with listening():  # from here on, as what is imported takes seconds
            from qat.training.run import run as main_job

            return main_job(load_config(config.resume) if config.resume and not config.model.path else config)
    except Interrupted as ended:
        print(f"qat.train: interrupted by signal {ended.number} before the run had a folder", file=sys.stderr)
        raise


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

    from qat.config.compose.errors import first_lines
    from qat.reporting.table import print_table

    try:
        result = run(build())
    except (ValueError, OSError) as error:
        _exit(error)
    except OmegaConfBaseException as error:
        _exit(first_lines(error))
    if result.perplexity:
        print_table(result)
    if result.signal is not None:
        sys.exit(128 + result.signal)


def _exit(error: object) -> NoReturn:
    print(f"qat.train: {error}", file=sys.stderr)
    sys.exit(2)


def main(arguments: list[str] | None = None) -> None:
    """The command line. `--dry-run` is short for dry_run=true; resume=DIR takes the configuration of that run."""
    from qat.config.compose.command import check_flags, help_text
    from qat.config.compose.keys import check_keys, config_folder

    # libgomp's threads spin while they wait: beside any other work on the machine that is ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = ["dry_run=true" if a == "--dry-run" else a for a in (sys.argv[1:] if arguments is None else arguments)]
    if {"-h", "--help"} & set(arguments):
        return print(help_text())
    try:
        check_flags(arguments)
        check_keys(arguments)
    except ValueError as error:
        _exit(error)
    resume = [a.partition("=")[2] for a in arguments if a.startswith("resume=")]
    if resume:
        overrides = [a for a in arguments if not a.startswith("resume=")]
        if flags := [a for a in overrides if a.startswith("-")]:
            _exit(f"{flags[0]} does not go with resume=, which continues one run; allowed beside it are settings as key=value")
        from qat.config.compose.saved import load_config

        return _show(lambda: load_config(resume[-1], overrides))

    import hydra

    from qat.config.compose.composing import check_composition
    from qat.config.compose.register import register

    register()
    folder = str(config_folder("conf"))
    try:
        check_composition(folder, arguments)
    except ValueError as error:
        _exit(error)
    sys.argv = [sys.argv[0], *arguments]
    hydra.main(config_path=folder, config_name="train", version_base="1.3")(_task)()


if __name__ == "__main__":
    main()
