"""python -m qat.train recipe=NAME key=value: the main job, from a pretrained model to verified, packed, exported weights.

`run(TrainConfig) -> RunResult` is a plain function (`qat.training.run`, readable top to bottom); what a command line means is
`qat.config.compose`'s. Heavy imports are inside functions, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qat.config import TrainConfig
from qat.config.run import AUTO

if TYPE_CHECKING:
    from qat.config.compose.command import Command
    from qat.config.compose.composing import Job
    from qat.reporting.result import RunResult
    from qat.training.sweeps.outcomes import Outcome

WRONG = 2
"""Exit code of an error that is the user's; 128 + N is that of a run which signal N interrupted."""


def run(config: TrainConfig) -> RunResult:
    """Load, convert, train, verify, pack and export (`qat.training.run`); everything measured is in the result and the folder.

    Raises:
        ValueError: a configuration, file, model or value that cannot work; the message says what, where and what is allowed.
    """
    from qat.config.compose.saved import load_config
    from qat.training.signals import listening

    with listening():  # from here on, as what is imported takes seconds
        from qat.training.run import run as main_job

        saved = config.resume not in (None, AUTO) and not config.model.path
        return main_job(load_config(str(config.resume)) if saved else config)


def _perform(config: TrainConfig) -> RunResult:
    """What the command does with a configuration: `run`, by as many processes as it has devices."""
    from qat.training.signals import listening

    with listening():
        from qat.training.strategies.launch import perform

        return perform(config)


def _by_all(build: Callable[[], TrainConfig]) -> TrainConfig:
    from qat.training.strategies.launch import made_by_all

    return made_by_all(build)


def _show(build: Callable[[], TrainConfig], perform: Callable[[TrainConfig], RunResult]) -> tuple[int, RunResult | None, str]:
    """Run and print the table; exit code, result, and its status or the user's error in one line, printed too."""
    from qat.parallel.group import Lost
    from qat.reporting.table import print_table
    from qat.training.strategies.environment import begun

    try:
        config = _by_all(build) if begun() else build()
        import_module("qat.training.run")  # here, where a signal ends the process at once
        result = perform(config)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"qat.train: {message}", file=sys.stderr)
        return WRONG, None, message
    except Lost as error:
        print(f"qat.train: {error}", file=sys.stderr)
        return 1, None, str(error)
    if result.measured:
        print_table(result)
    return 0 if result.signal is None else 128 + result.signal, result, result.status


def _sweep(jobs: list[Job]) -> int:
    """All jobs one after another, whatever becomes of one; a line a job says at the end what did. An interrupted one ends it."""
    from qat.training.sweeps.jobs import job_of, told

    found: list[Outcome] = []
    for job in jobs:
        print(f"job {job.number} of {len(jobs)}: {job.words}", flush=True)
        folder = job.config.run.dir if job.config else None
        found.append(job_of(job.number, job.words, folder, partial(_show, job.build), _perform)[0])
        if found[-1].code not in (0, 1, WRONG):
            break
    return told(found)


def _by_hydra(command: Command, settings: list[str]) -> int:
    """Hydra's own main: its flags, and sweepers and launchers of its plugins, which get what is to be minimised."""
    import hydra

    from qat.config.compose.command import sweep_folder
    from qat.config.compose.composing import compose_run, job_config, job_words, of_hydra
    from qat.config.compose.keys import config_folder
    from qat.config.compose.register import register
    from qat.training.sweeps.jobs import job_of, told
    from qat.training.sweeps.outcomes import note, noted, size_of

    register(settings, command.config_dir)
    if not command.multirun:
        compose_run(settings, command.config_dir)
    search = ["--config-dir", command.config_dir] if command.config_dir else []
    folder, where = sweep_folder(settings) if command.multirun else (None, [])
    since, codes = size_of(folder), [0]

    def task(composed: Any) -> float | None:
        number, words = job_words([*settings, *where])
        if number is None or folder is None:
            codes.append(_show(lambda: job_config(composed), _perform)[0])
            return None
        print(f"job {number}: {words}", flush=True)
        outcome, value = job_of(
            number, words, f"{folder}/{number}", partial(_show, partial(job_config, composed, words)), _perform
        )
        note(outcome)
        if outcome.code not in (0, 1, WRONG):
            sys.exit(outcome.code)  # a signal ends the sweep, and Hydra holds back errors alone
        return value

    sys.argv = [sys.argv[0], *search, *command.flags, *(["-m"] if command.multirun else []), *settings, *where]
    try:
        with of_hydra():
            hydra.main(config_path=str(config_folder("conf")), config_name="train", version_base="1.3")(task)()
    finally:
        worst = told(noted(folder, since)) if folder else max(codes)
    return worst


def _serve(command: Command) -> int:
    from qat.config.compose.composing import compose_jobs, compose_run
    from qat.config.compose.resume import resumed
    from qat.config.compose.text import as_typed
    from qat.training.strategies.environment import begun

    settings = [as_typed(one, command.multirun) for one in command.settings]
    if command.resume is not None:
        folder, settings = command.resume, [one for one in settings if not one.startswith("resume=")]
        return _show(lambda: resumed(folder, settings)[0], _perform)[0]
    if command.multirun and begun():
        raise ValueError(
            "a sweep starts the processes of its jobs itself: leave torchrun or srun out, and give trainer.devices=N"
        )
    if command.by_hydra:
        return _by_hydra(command, settings)
    if command.multirun:
        return _sweep(compose_jobs(settings, command.config_dir))
    return _show(lambda: compose_run(settings, command.config_dir), _perform)[0]


def main(arguments: list[str] | None = None) -> None:
    """The command line. `--dry-run` is short for dry_run=true; resume=DIR takes the configuration of that run."""
    from qat.config.compose.command import parse
    from qat.config.compose.help import help_text
    from qat.training.signals import Interrupted, listening
    from qat.training.strategies.environment import after_first, hush

    # libgomp's threads spin while they wait: beside any other work on the machine that is ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = sys.argv[1:] if arguments is None else arguments
    hush()
    try:
        if {"-h", "--help"} & set(arguments):
            return print(help_text(arguments))
        with listening(leave=True):
            code = _serve(parse(arguments))
    except Interrupted as ended:
        print(f"qat.train: interrupted by signal {ended.number} before the run had a folder", file=sys.stderr)
        raise
    except (ValueError, OSError) as error:
        print(f"qat.train: {' '.join(str(error).split())}", file=sys.stderr)
        code = WRONG
    if code:
        after_first(code)
        sys.exit(code)


if __name__ == "__main__":
    main()
