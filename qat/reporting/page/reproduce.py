"""How a run is made again, and what comes after it: commands with this run's own paths."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from qat.config import TrainConfig
from qat.config.compose.composing import compose_run
from qat.config.compose.keys import options
from qat.reporting.following import go_on, labelled
from qat.reporting.page.reading import Run

ELSEWHERE = ("run", "resume", "dry_run", "trust_targets")
"""Sections that say where and how a command runs, not what it computes."""


def recipe_of(run: Run) -> str | None:
    """The recipe that the run was started with: of its command, or that of the run's name."""
    words = shlex.split(str(run.starts[0].get("command", ""))) if run.starts else []
    said = [word.partition("=")[2] for word in words if word.startswith("recipe=")]
    name = said[-1] if said else run.name
    return name if name in options()["recipe"] else None


@lru_cache(maxsize=8)
def _of_recipe(name: str | None) -> dict[str, Any]:
    """The values of a recipe, or the defaults."""
    return flat(asdict(compose_run([f"recipe={name}"]) if name else TrainConfig()))


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Key with dots -> value; an empty mapping is a value."""
    if not isinstance(node, dict) or (not node and prefix):
        return {prefix: node}
    return {key: value for name, inner in node.items() for key, value in flat(inner, f"{prefix}.{name}".lstrip(".")).items()}


def differences(run: Run) -> tuple[str | None, dict[str, tuple[Any, Any]]]:
    """(recipe, key -> its value there and the run's); without a recipe against the defaults.

    Keys that the run's version did not have yet are not differences.
    """
    recipe = recipe_of(run)
    try:
        usual = _of_recipe(recipe)
    except ValueError:
        recipe, usual = None, _of_recipe(None)
    mine = {key: value for key, value in flat(run.config).items() if key.partition(".")[0] not in ELSEWHERE}
    return recipe, {key: (usual.get(key), value) for key, value in mine.items() if _plain(usual.get(key)) != _plain(value)}


def _plain(value: Any) -> Any:
    """Tuples are lists, and 3 is 3.0, once they are in YAML."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def command(run: Run) -> str:
    """The command that started it; of a run that Python started the one that would."""
    if run.starts and (said := run.starts[0].get("command")):
        return str(said)
    recipe, found = differences(run)
    words = [f"recipe={recipe}"] if recipe else []
    settings = [f"{key}={setting(new)}" for key, (_, new) in found.items()]
    return shlex.join(["python", "-m", "qat.train", *words, *settings])


def setting(value: Any) -> str:
    """A value as it is typed behind `key=`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{setting(inner)}" for key, inner in value.items()) + "}"
    return "[" + ",".join(setting(one) for one in value) + "]" if isinstance(value, list | tuple) else str(value)


def next_commands(run: Run) -> list[tuple[str, str]]:
    """(what for, command) of what a reader would do now: as the terminal has said, and on from there."""
    if run.result.status == "running" and not run.killed:
        watch = shlex.join(["python", "-m", "qat.report", "--watch", str(run.folder)])
        return [*_slower(run), ("look on while it trains", watch), ("go on, if it was killed", go_on(run.folder)[1])]
    if not run.done:
        return _slower(run) or [go_on(run.folder)]
    found = labelled(run.result, run.folder)
    return [*_slower(run), *found, *([go_on(run.folder, "trainer.max_steps=N")] if found else [])]


def _slower(run: Run) -> list[tuple[str, str]]:
    """Of a run that diverges: the run anew, with what its alarm says. To go on would repeat it."""
    if run.divergence is None:
        return []
    key = run.divergence.key
    gone = (key.partition("=")[0] + "=", "run.dir=", "resume=")
    words = [word for word in shlex.split(command(run)) if not word.startswith(gone)]
    return [("begin anew, slower", shlex.join([*words, key]))]
