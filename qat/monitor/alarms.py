"""alarms.jsonl: what went wrong in a training, in words; an append-only file in the run's folder, and its reader.

A line is an alarm, or says that one has cleared. A line that a kill tore is none, and goes when the run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qat.storage import json_lines, write_text

NAME = "alarms.jsonl"


@dataclass(frozen=True)
class Alarm:
    """Something that a person should know."""

    step: int
    """At which it was raised."""
    kind: str
    """Of `qat.monitor.rules.RULES`."""
    text: str
    """What is wrong and its likely cause, one line."""
    key: str
    """What to change, as one would type it; '' where there is nothing to change but to wait."""
    where: str = ""
    """The family or layer; '' for the whole run."""
    until: int | None = None
    """The step at which it had cleared; None while it has not."""

    @property
    def line(self) -> str:
        """For a terminal."""
        return f"step {self.step}: {self.text}" + (f"; try {self.key}" if self.key else "")


class AlarmsFile:
    """Appends to the folder's file. `step` as for `LayersFile`: what was raised or cleared later is dropped."""

    def __init__(self, folder: Path, step: int | None = None) -> None:
        self.file = folder / NAME
        kept = [] if step is None else [one for one in _lines(self.file) if one["step"] <= step]
        self.file.unlink(missing_ok=True) if not kept else write_text(self.file, "".join(map(_text, kept)))

    def raised(self, alarm: Alarm) -> None:
        """Note an alarm."""
        self._append({key: value for key, value in asdict(alarm).items() if key != "until"})

    def cleared(self, alarm: Alarm, step: int) -> None:
        """Note that it is over."""
        self._append({"step": step, "clears": alarm.kind, "where": alarm.where})

    def _append(self, event: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(_text(event))


def read_alarms(folder: Path) -> list[Alarm]:
    """All alarms of a run in the order in which they were raised; [] where there is no file."""
    found: list[Alarm] = []
    for event in _lines(folder / NAME):
        if "clears" in event:
            place = event["clears"], event["where"]
            for i, one in enumerate(found):
                if one.until is None and (one.kind, one.where) == place:
                    found[i] = replace(one, until=event["step"])
        else:
            found.append(Alarm(**event))
    return found


def _text(event: dict[str, Any]) -> str:
    return json.dumps(event) + "\n"


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The events that are whole: an alarm with all of its fields, or a clearance."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    yield from filter(_is_event, json_lines(text))


_TYPES = {"step": int, "kind": str, "text": str, "key": str, "where": str}


def _is_event(event: dict[str, Any]) -> bool:
    if type(event.get("step")) is not int:
        return False
    if isinstance(event.get("clears"), str):
        return isinstance(event.get("where"), str)
    return event.keys() == _TYPES.keys() and all(isinstance(event[key], kind) for key, kind in _TYPES.items())
