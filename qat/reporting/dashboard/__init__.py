"""W&B dashboards as code: a workspace and a report, made of the table of metrics.

wandb-workspaces checks a specification as it is built, without a key and without a network; only saving asks for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qat.reporting.dashboard.panels import charts, compared

SECTIONS = ("Overview", "Quantization health", "Families", "Optimization", "Speed", "Results")
TITLE = "Quantization-aware training"


def workspace(entity: str, project: str) -> Any:
    """The workspace: a section of panels for each of `SECTIONS`."""
    import wandb_workspaces.workspaces as ws

    settings = ws.SectionPanelSettings(x_axis="step")
    sections = [
        ws.Section(name=name, panels=panels, is_open=name == "Overview", panel_settings=settings)
        for name, panels in sections_of()
    ]
    return ws.Workspace(entity=entity, project=project, name=TITLE, sections=sections)


def report(entity: str, project: str, runs: bool) -> Any:
    """The report: the same sections as text and panels; `runs`: of that project's runs, which must be looked up with a key."""
    import wandb_workspaces.reports.v2 as wr

    runset = wr.Runset(entity=entity, project=project) if runs else wr.Runset()
    blocks: list[Any] = [wr.TableOfContents()]
    for name, panels in sections_of():
        blocks += [wr.H1(name), wr.PanelGrid(runsets=[runset], panels=panels)]
    return wr.Report(entity=entity, project=project, title=TITLE, description="Made by python -m qat.dashboard", blocks=blocks)


def sections_of() -> Iterator[tuple[str, list[Any]]]:
    """Section -> its panels, on a grid of three columns."""
    for name in SECTIONS:
        yield name, compared() if name == "Results" else charts(name)


def specification(entity: str, project: str) -> str:
    """Workspace and report as JSON, the same each time."""
    models = {"workspace": workspace(entity, project)._to_model(), "report": report(entity, project, runs=False)._to_model()}
    plain = {name: json.loads(one.model_dump_json(by_alias=True)) for name, one in models.items()}
    return json.dumps(_counted(plain, {}), indent=1, sort_keys=True) + "\n"


def _counted(node: Any, seen: dict[str, str]) -> Any:
    """Ids that the library draws are replaced by their order, so that a file of it changes where the dashboard does."""
    if isinstance(node, dict):
        return {key: _id(value, seen) if key in _IDS and value else _counted(value, seen) for key, value in node.items()}
    return [_counted(one, seen) for one in node] if isinstance(node, list) else node


_IDS = ("__id__", "id", "ref", "viewID")


def _id(value: Any, seen: dict[str, str]) -> Any:
    return seen.setdefault(value, f"id{len(seen)}") if isinstance(value, str) else _counted(value, seen)


def metrics(spec: Any) -> set[str]:
    """The names of metrics that a specification draws; patterns are left out."""
    found: set[str] = set()
    if isinstance(spec, dict):
        found |= {one for one in spec.get("metrics") or [] if isinstance(one, str)}
        found |= {spec[key] for key in ("targetKey", "xAxis") if isinstance(spec.get(key), str)}
        found |= {str(spec["accessor"]).removeprefix("summary:") for key in ("accessor",) if "summary:" in str(spec.get(key))}
    inner = spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else ()
    return found.union(*(metrics(one) for one in inner))


def patterns(spec: Any) -> set[str]:
    """The regular expressions by which a specification draws what it cannot name: families, groups, terms."""
    own = {spec["metricRegex"]} if isinstance(spec, dict) and spec.get("metricRegex") else set()
    inner = spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else ()
    return own.union(*(patterns(one) for one in inner))
