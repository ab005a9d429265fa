"""rows.yaml: which settings are compared, on which models, at which budgets.

A row is a diff of another one (`like`) down to `base`, so that what is compared is read at a glance. Every run of a model at a
budget trains on the same number of tokens in the same order; how many updates that makes follows from the row's batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("rows.yaml")
STEPS = ("optim.warmup_steps", "optim.lambda_steps")
"""Keys that a row may give as a percentage of its updates."""
GROUPS = ("recipe", "model", "data", "quant", "distill", "optim", "task")
"""Config groups, which come before single keys."""


@dataclass(frozen=True)
class Row:
    """One setting."""

    name: str
    of: str
    """Who proposes it: ours, a peer's name, or `reference`."""
    says: str
    """The setting in words, for the table."""
    keys: Mapping[str, Any]
    sweep: Mapping[str, list[Any]] = field(default_factory=dict)
    """Keys with the values that are tried at the screening budget; later budgets take the best."""


@dataclass(frozen=True)
class Run:
    """One training: a row on a model at a budget with a seed, and the swept values that it takes."""

    row: Row
    model: str
    budget: str
    seed: int
    tokens: int
    base: Mapping[str, Any]
    choice: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its folder below the study's."""
        chosen = "".join(f"-{key.rpartition('.')[2]}{value:g}" for key, value in self.choice.items())
        return f"{self.model}/{self.budget}/{self.row.name}/seed{self.seed}{chosen}"

    def arguments(self, places: Mapping[str, str]) -> list[str]:
        """What follows `python -m qat.train`; `{shared}` in a value is the folder that `places` gives for it."""
        keys = {"recipe": "plain", **self.base, **self.row.keys, **self.choice, "seed": self.seed}
        updates = max(1, self.tokens // (int(keys["data.batch_size"]) * int(keys["data.sequence_length"])))
        keys["trainer.max_steps"] = updates
        for key in STEPS:
            value = keys.get(key)
            if isinstance(value, str) and value.endswith("%"):
                keys[key] = round(updates * float(value[:-1]) / 100)
        groups = [f"{key}={keys.pop(key)}" for key in GROUPS if key in keys]
        return [*groups, *(f"{key}={_text(value, places)}" for key, value in keys.items())]


def _text(value: Any, places: Mapping[str, str]) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value).replace("'", "")
    for name, folder in places.items():
        text = text.replace(f"{{{name}}}", folder)
    return text


@dataclass(frozen=True)
class Study:
    """All of rows.yaml."""

    models: Mapping[str, Mapping[str, Any]]
    budgets: Mapping[str, Mapping[str, Any]]
    rows: Mapping[str, Row]
    plan: list[Mapping[str, Any]]

    def runs(self, plan: Mapping[str, Any]) -> Iterator[list[Run]]:
        """For each row of a plan its runs with every combination of swept values."""
        budget = self.budgets[plan["budget"]]
        for name in plan["rows"]:
            row = self.rows[name]
            combinations = itertools.product(*row.sweep.values())
            choices = [dict(zip(row.sweep, values, strict=True)) for values in combinations]
            yield [
                Run(row, plan["model"], plan["budget"], seed, budget["tokens"], self.models[plan["model"]], choice)
                for choice in choices
                for seed in plan.get("seeds", [0])
            ]


def read(file: Path = FILE) -> Study:
    """The study. Raises ValueError for a row or plan that names what is not there."""
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    rows = {name: _row(name, values["rows"]) for name in values["rows"]}
    for plan in values["plan"]:
        unknown = [name for name in plan["rows"] if name not in rows]
        if unknown or plan["model"] not in values["models"] or plan["budget"] not in values["budgets"]:
            raise ValueError(f"{file}: the plan {plan['budget']} of {plan['model']} names what is not there: {unknown}")
    return Study(values["models"], values["budgets"], rows, values["plan"])


def _row(name: str, rows: Mapping[str, Any]) -> Row:
    """A row with all that it takes from those it is like."""
    chain, at = [], name
    while at is not None:
        if at not in rows:
            raise ValueError(f"rows.yaml: {name} is like {at}, which is no row")
        chain.append(rows[at])
        at = rows[at].get("like")
    keys: dict[str, Any] = {}
    sweep: dict[str, list[Any]] = {}
    for one in reversed(chain):
        given = one.get("keys", {})
        keys |= given
        sweep = one.get("sweep") or {key: values for key, values in sweep.items() if key not in given}
    return Row(name, rows[name].get("of", "ours"), rows[name]["says"], keys, sweep)
