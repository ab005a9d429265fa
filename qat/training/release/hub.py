"""Pushing a run to the hub: refused before the training where it could not be done after it, and one commit at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, validate_repo_id

from qat.config import TrainConfig
from qat.parallel import ranks
from qat.reporting.result import RunResult
from qat.terminal.stage import stage
from qat.training.release.card import CARD, files, write_card


def check_push(config: TrainConfig) -> None:
    """Ask the hub who we are, where export.push_to_hub is set; nothing is made there yet.

    Raises:
        ValueError: the name is none, the hub cannot be reached, or the token is missing, wrong, of somebody else or only reads.
    """
    if (repo := config.export.push_to_hub) is None:
        return
    said = f"export.push_to_hub={repo}"
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{said} needs the network, but HF_HUB_OFFLINE is set")
    try:
        validate_repo_id(repo)
        found = ranks.shared(lambda: HfApi().whoami())
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{said} needs a token that may write: `hf auth login`, or HF_TOKEN in the environment") from error
    except Exception as error:  # the hub's own errors, and those of whatever client it uses
        raise ValueError(f"{said}: the hub does not let us in: {_line(error)}") from error
    _check_rights(said, repo.partition("/")[0], found)


def _check_rights(said: str, owner: str, found: dict[str, Any]) -> None:
    names = [found.get("name"), *(one.get("name") for one in found.get("orgs") or [])]
    if owner not in names:
        raise ValueError(f"{said}: the token is of {found.get('name')}, who may write to {', '.join(filter(None, names))}")
    token = (found.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise ValueError(f"{said}: the token {token.get('displayName', '')} may only read; make one that may write")


def publish(config: TrainConfig, folder: Path, result: RunResult) -> dict[str, Any]:
    """On the first rank: `published`."""
    return ranks.shared(lambda: _published(config, folder, result))


def _published(config: TrainConfig, folder: Path, result: RunResult) -> dict[str, Any]:
    """Write the model card, and push it with all that was written where export.push_to_hub says so; facts for the result.

    Files of an earlier commit that this run did not write stay in the repository.

    Raises:
        ValueError: the hub refuses; nothing of the commit is there then.
    """
    card, repo = write_card(config, folder, result), config.export.push_to_hub
    if repo is None:
        return {}
    operations = [CommitOperationAdd(place, path) for place, path in {**_files(folder, result), CARD: card}.items()]
    with stage(f"pushing to {repo}"), _without_bars():
        try:
            api = HfApi()
            api.create_repo(repo, private=config.export.hub_private, exist_ok=True)
            done = api.create_commit(repo, operations, commit_message=f"{config.run.name}, trained and packed by qat")
        except Exception as error:  # as above
            again = f"all of it is in {folder}; resume={folder} tries again"
            raise ValueError(f"export.push_to_hub={repo}: the hub refused: {_line(error)}; {again}") from error
    return {"repo": repo, "url": str(done.repo_url), "commit": done.oid, "files": len(operations)}


def _files(folder: Path, result: RunResult) -> dict[str, Path]:
    """Place in the repository -> file; a card of an export's own gives way to the run's."""
    found = {}
    for source, place in files(folder, result).items():
        if source.is_file():
            found[place] = source
            continue
        found |= {
            "/".join(filter(None, (place, *one.relative_to(source).parts))): one
            for one in sorted(source.rglob("*"))
            if one.is_file()
        }
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def _without_bars() -> Iterator[None]:
    """The stage shows that something goes on."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
