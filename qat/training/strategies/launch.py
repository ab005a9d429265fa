"""How the processes of a run begin: by torchrun or srun, or by the command itself, which then is the launcher of its ranks.

All processes do the same from the top of the main job to its end. lightning would start the others when a fit begins, by calling
the command again: they would repeat what came before, a sweep too, and choose a folder of their own. torch's elastic agent, which
torchrun is made of, starts them here with a configuration that is composed already, and ends all when one dies.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat import parallel
from qat.config import TrainConfig, TrainerConfig
from qat.parallel.group import Lost, joined, leave_word
from qat.training.signals import NUMBERS, Interrupted
from qat.training.strategies.environment import begun, given, nodes_and_devices, silent

if TYPE_CHECKING:
    from qat.reporting.result import RunResult


_PATIENCE = 25.0
"""Seconds; the agent's ends after 30."""


@contextmanager
def started(config: TrainConfig) -> Iterator[TrainConfig]:
    """Be one of the run's processes, with the configuration of rank 0; where there is one process, with its own.

    All ranks but the first are silent within.

    Raises:
        ValueError: several devices are asked for and nothing has started processes for them, or not as many; or these
            processes have different configurations.
    """
    with given(), joined():
        config = replace(config, trainer=counted(config.trainer, config.dry_run))
        with silent(not parallel.first()), _last_words():
            same_configuration(config)
            yield parallel.shared(lambda: config)


def counted(trainer: TrainerConfig, dry: bool = False) -> TrainerConfig:
    """The section with the nodes and devices that there are processes for; one that does not ask for several takes these.

    Raises:
        ValueError: it asks for others.
    """
    wanted, (nodes, devices) = (trainer.num_nodes, trainer.devices), nodes_and_devices()
    if wanted == (nodes, devices) or (dry and not begun()):
        return trainer
    if not begun():
        raise ValueError(_how_to_start(trainer))
    if wanted not in ((1, 1), (1, devices)):
        there = f"{devices} process" + "es" * (devices > 1) + (f" on each of {nodes} nodes" if nodes > 1 else " on one node")
        raise ValueError(
            f"trainer.num_nodes={wanted[0]}, trainer.devices={wanted[1]}, but torchrun or srun has started {there}; give it the"
            " same numbers, or leave the keys out"
        )
    return replace(trainer, num_nodes=nodes, devices=devices)


def made_by_all(make: Callable[[], TrainConfig]) -> TrainConfig:
    """What `make` returns in this process; where it fails in one of several, all refuse, before they have met otherwise.

    Raises:
        ValueError: (or OSError) its own error; that of another process is raised by `started`.
    """
    try:
        return make()
    except (ValueError, OSError) as error:
        with given(), joined():
            parallel.failed(error)
        raise


def _how_to_start(trainer: TrainerConfig) -> str:
    asked = f"trainer.devices={trainer.devices}" + (f", trainer.num_nodes={trainer.num_nodes}" * (trainer.num_nodes > 1))
    nodes = f"--nnodes {trainer.num_nodes} " if trainer.num_nodes > 1 else "--standalone "
    line = f"torchrun {nodes}--nproc-per-node {trainer.devices} -m qat.train ..."
    return f"{asked}: several devices need a process each, which nothing has started here; use {line}, or srun"


def same_configuration(config: TrainConfig) -> None:
    """Raise ValueError on all ranks where they do not have the same one; only its folder may be another, which rank 0 names."""
    mine = _flat(asdict(replace(config, run=replace(config.run, dir=None, group=None))))
    everyone = parallel.gathered(mine)
    for number, other in enumerate(everyone):
        for key in sorted(everyone[0].keys() | other.keys()):
            ours, theirs = (one.get(key) for one in (everyone[0], other))
            if ours != theirs:
                raise ValueError(f"the processes of this run differ in {key}: rank 0 has {ours!r}, rank {number} {theirs!r}")


def _flat(node: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return found


@contextmanager
def _last_words() -> Iterator[None]:
    """What ends this rank is told to those who only see that it is gone."""
    try:
        yield
    except Lost:
        raise
    except Exception as error:
        leave_word(f"rank {parallel.rank()}: {error or type(error).__name__}")
        raise


def perform(config: TrainConfig) -> RunResult:
    """Run a configuration as the command does: here, or by as many processes as it has devices, with this one as their launcher.

    Raises:
        ValueError: what `qat.training.run.run` raises.
        Lost: a process died.
    """
    from qat.training.fit import check_hardware
    from qat.training.run import run

    if begun() or config.dry_run or config.trainer.devices == 1 or config.trainer.num_nodes > 1:
        return run(config)
    check_hardware(config.trainer)
    return _launched(config)


def _launched(config: TrainConfig) -> RunResult:
    """Start the ranks and wait for them: rank 0's result, which it leaves in a file, or its error."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=config.trainer.devices, run_id="qat", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0, monitor_interval=0.2,
    )  # fmt: skip
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # see `hush`
    before = {number: signal.getsignal(number) for number in NUMBERS}
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        multiprocessing.set_start_method("spawn", force=True)  # joblib's own way, of which our ranks would know nothing
    with tempfile.TemporaryDirectory() as folder:
        outcome, ended = Path(folder) / "outcome", "without a result"
        try:
            elastic_launch(settings, _rank)(config, str(outcome), os.getpid())
        except ChildFailedError as error:
            ended = _words(error)
        except BaseException as error:
            if (number := getattr(error, "sigval", None)) is None:
                raise
            if not outcome.exists():
                raise Interrupted(int(number)) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        return _result(outcome, ended)


def _words(error: Any) -> str:
    number, failure = error.get_first_failure()
    how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with code {failure.exitcode}"
    return f"rank {number} {how}"


def _result(outcome: Path, ended: str) -> RunResult:
    if not outcome.exists():
        raise Lost(f"the run ended as {ended}; its folder holds what it came to, and resume=FOLDER goes on from its checkpoint")
    kind, found = pickle.loads(outcome.read_bytes())  # which our own process has written
    if kind == "result":
        return found  # type: ignore[no-any-return]
    raise ValueError(found) if kind == "refused" else Lost(f"{found} ({ended})")


def _rank(config: TrainConfig, outcome: str, launcher: int) -> None:
    """What each process does; rank 0 leaves its result for the launcher.

    Where a run has ended early its processes leave at once, once that result is there: the agent, which may be ending them, would
    have each of them wait for half a minute until somebody takes what the function returns.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from qat.training.run import run

    code = 0
    try:
        found: tuple[str, Any] = "result", run(config)
        code = 0 if found[1].signal is None else 128 + found[1].signal
    except (ValueError, OSError) as error:
        found = "refused", str(error)
    except Lost as error:
        found, code = ("lost", str(error)), 1
    except Interrupted as signalled:
        os._exit(128 + signalled.number)
    if os.environ["RANK"] == "0":
        partial = Path(f"{outcome}.partial")
        partial.write_bytes(pickle.dumps(found))
        partial.rename(outcome)
    if code:
        _leave(Path(outcome), code, wait=found[0] == "result")


def _leave(outcome: Path, code: int, wait: bool) -> None:
    """End this process; not before rank 0 is done, as the agent ends all others with the first."""
    until = time.monotonic() + _PATIENCE
    while wait and not outcome.exists() and time.monotonic() < until:
        time.sleep(0.05)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
