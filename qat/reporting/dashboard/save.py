"""Saving the dashboards where there is a key, and writing their specification where there is none."""

from __future__ import annotations

from pathlib import Path

from qat.reporting.dashboard import report, specification, workspace
from qat.reporting.dashboard.key import has_key
from qat.storage import write_text


def build(project: str, out: Path | None) -> list[str]:
    """Save workspace and report into PROJECT or ENTITY/PROJECT, or write their specification; lines that say which.

    Raises:
        ValueError: wandb-workspaces is missing, there is no such project, or the key is not taken.
    """
    try:
        import wandb  # noqa: F401
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        raise ValueError(f"dashboards need wandb-workspaces: pip install qat-bitlinear[dashboard] ({error})") from error
    entity, _, name = project.rpartition("/")
    if not name or "/" in entity:
        raise ValueError(f"--project {project!r} is not allowed; it must be PROJECT or ENTITY/PROJECT")
    if out is not None or not has_key():
        file = out or Path("dashboard.json")
        write_text(file, specification(entity or "entity", name))
        why = "" if out is not None else "; there is no key of Weights & Biases (wandb login), so nothing was saved there"
        return [f"{file}: specification of the workspace and the report{why}"]
    return _saved(entity, name)


def _saved(entity: str, name: str) -> list[str]:
    import wandb

    try:
        api = wandb.Api()
        entity = entity or str(api.default_entity)
        _ = api.project(name, entity).id
    except Exception as error:  # wandb's own, of no common class
        said = " ".join(str(error).split())
        raise ValueError(f"--project {entity}/{name}: there is no such project, or the key may not see it: {said}") from error
    return [f"workspace {workspace(entity, name).save().url}", f"report {report(entity, name, runs=True).save(draft=False).url}"]
