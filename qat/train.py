"""python -m qat.train recipe=NAME key=value: the main job, from a pretrained model to verified, packed, exported weights.

`run(TrainConfig) -> RunResult` is a plain function (`qat.training.run`, readable top to bottom); what a command line means is
`qat.config.compose`'s. Heavy imports are inside functions, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qat.config import TrainConfig

if TYPE_CHECKING:
    from qat.config.compose.command import Command
    from qat.config.compose.composing import Job
    from qat.reporting.result import RunResult

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

        return main_job(load_config(config.resume) if config.resume and not config.model.path else config)


def _show(build: Callable[[], TrainConfig]) -> tuple[int, float | None, str]:
    """Run and print the table; exit code, objective, and the user's error in one line, printed too."""
    from qat.reporting.table import print_table

    try:
        config = build()
        import_module("qat.training.run")  # here, where a signal ends the process at once
        result = run(config)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"qat.train: {message}", file=sys.stderr)
        return WRONG, None, message
    if result.measured:
        print_table(result)
    code = 0 if result.signal is None else 128 + result.signal
    return code, result.objective, result.status


def _sweep(jobs: list[Job]) -> int:
    """All jobs one after another, whatever becomes of one; a line a job says at the end what did. An interrupted one ends it."""
    worst, lines = 0, []
    for job in jobs:
        print(f"job {job.number} of {len(jobs)}: {job.words}", flush=True)
        try:
            code, objective, status = _show(job.build)
        except Exception as error:
            traceback.print_exc()
            code, objective, status = 1, None, f"{type(error).__name__}: {error}"
        where = job.config.run.dir if job.config else "not run"
        value = "" if objective is None else f"  trained {objective:.4f}"
        lines.append(f"job {job.number}  {job.words}  {where}{value}  {'failed: ' if code in (1, WRONG) else ''}{status}")
        worst = max(worst, code)
        if code not in (0, 1, WRONG):
            break
    print(*lines, sep="\n")
    return worst


def _by_hydra(command: Command, settings: list[str]) -> int:
    """Hydra's own main: its flags, and sweepers and launchers of its plugins, which get what is to be minimised."""
    import hydra

    from qat.config.compose.composing import compose_run, job_config
    from qat.config.compose.keys import config_folder
    from qat.config.compose.register import register

    codes = [0]

    def task(composed: Any) -> float | None:
        code, objective, _ = _show(lambda: job_config(composed))
        codes.append(code)
        return float("nan") if code else objective

    register(settings, command.config_dir)
    if not command.multirun:
        compose_run(settings, command.config_dir)
    search = ["--config-dir", command.config_dir] if command.config_dir else []
    sys.argv = [sys.argv[0], *search, *command.flags, *(["-m"] if command.multirun else []), *settings]
    hydra.main(config_path=str(config_folder("conf")), config_name="train", version_base="1.3")(task)()
    return max(codes)


def _serve(command: Command) -> int:
    from qat.config.compose.composing import compose_jobs, compose_run
    from qat.config.compose.resume import resumed
    from qat.config.compose.text import as_typed

    settings = [as_typed(one, command.multirun) for one in command.settings if not one.startswith("resume=")]
    if command.resume is not None:
        folder = command.resume
        return _show(lambda: resumed(folder, settings)[0])[0]
    if command.by_hydra:
        return _by_hydra(command, settings)
    if command.multirun:
        return _sweep(compose_jobs(settings, command.config_dir))
    return _show(lambda: compose_run(settings, command.config_dir))[0]


def main(arguments: list[str] | None = None) -> None:
    """The command line. `--dry-run` is short for dry_run=true; resume=DIR takes the configuration of that run."""
    from qat.config.compose.command import parse
    from qat.config.compose.help import help_text
    from qat.training.signals import Interrupted, listening

    # libgomp's threads spin while they wait: beside any other work on the machine that is ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = sys.argv[1:] if arguments is None else arguments
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
        sys.exit(code)


if __name__ == "__main__":
    main()
