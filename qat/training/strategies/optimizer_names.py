"""The optimizer's state in checkpoints, keyed by the parameters' names.

torch numbers parameters in the order of the optimizer's groups, so a file would fit only a run that groups as the one that wrote
it, and nobody could read in it what belongs to what. Files of earlier versions hold numbers, and are loaded by them.
"""

from __future__ import annotations

from typing import Any

Groups = dict[str, list[str]]
"""Name of a parameter group -> names of its parameters, both in the optimizer's order."""


def named(state: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """A `state_dict` of an optimizer, or of several ("parts"), with names in place of numbers."""
    if "parts" in state:
        return {"parts": [named(part, groups) for part in state["parts"]]}
    names = {
        number: name
        for group in state.get("param_groups", ())
        for number, name in zip(group["params"], groups[group["name"]], strict=True)
    }
    return _renamed(state, names)


def numbered(state: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """The inverse, for an optimizer of these groups; one of an earlier version, with numbers, as it is.

    Raises:
        ValueError: the file is of other parameters or groups.
    """
    if "parts" in state:
        return {"parts": [numbered(part, groups) for part in state["parts"]]}
    saved = {group["name"]: group for group in state["param_groups"] if "name" in group}
    if not any(isinstance(name, str) for group in saved.values() for name in group["params"]):
        return state
    mine = {name: groups.get(name, []) for name in groups if name in saved}
    wanted, found = {n for names in mine.values() for n in names}, {n for group in saved.values() for n in group["params"]}
    if wanted != found:
        raise ValueError(f"the checkpoint's optimizer is of other parameters: {', '.join(sorted(wanted ^ found)[:3])}")
    numbers = {name: number for number, name in enumerate(name for names in mine.values() for name in names)}
    state = {**state, "param_groups": [{**saved[name], "params": names} for name, names in mine.items()]}
    return _renamed(state, numbers)


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state.get("param_groups", ())]
    return {**state, "state": {names[key]: value for key, value in state.get("state", {}).items()}, "param_groups": groups}
