"""Overrides of a run that is continued: which keys may change, what changed, and the record of it.

A checkpoint holds weights, optimizer state and the place in the data. A key may change on resume if the rest of the run can
follow it from there; one that would make the checkpoint's contents those of another run is refused.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from qat.config.compose.composing import as_config, compose_config, one_line
from qat.config.compose.keys import config_folder, options
from qat.config.compose.saved import ASKED, check_trust, read_saved, save_config
from qat.config.compose.text import KINDS
from qat.config.compose.yaml_files import read_yaml
from qat.config.run import TrainConfig
from qat.storage import local

Changes = dict[str, tuple[Any, Any]]
"""Key -> its value so far and its new one."""

HISTORY = "overrides.jsonl"
"""A line for each resume that changed something: time, step, and key -> [old, new]."""

REFUSED = {
    "task": "the checkpoint's model was trained for that task",
    "control.first": "the checkpoint started from the control, or did not",
    "model": "the checkpoint's weights are of that model",
    "quant": "the checkpoint was trained with that quantizer",
    "data": "the place in the data is the checkpoint's",
    "seed": "the checkpoint continues the order and the random numbers of that seed",
    "run": "the run stays in its folder, under its name",
    "optim.optimizer": "the checkpoint holds the state of that optimizer",
    "optim.latent_optimizer": "the checkpoint holds the state of the optimizers that it was trained with",
}
"""Keys, or all keys below one, that cannot change on resume, with the reason. All others apply from the checkpoint on."""

ALLOWED = {
    "model.teacher": "the loss asks the new teacher from there on",
    "model.attn_implementation": "how attention is computed from there on; values differ by rounding, as gradients' do",
    "model.teacher_dtype": "the loss asks the new teacher from there on",
    "model.trust_remote_code": "says again that the model's code may run",
    "quant.kernels": "all kernels give the same values",
    "quant.backward": "the precision of gradients from there on",
    "data.batch_size": "the run counts optimizer steps",
    "data.workers": "loader processes give the same batches",
    "data.cache_dir": "where tokens are kept, not which",
}
"""The exceptions below a refused key, with the reason."""


def resumed(folder: str, overrides: list[str]) -> tuple[TrainConfig, Changes]:
    """The configuration with which the run in `folder` goes on, and what differs from how it was last run.

    Raises:
        ValueError: the folder holds no run or is not to be trusted, or an override cannot be read or cannot apply.
    """
    folder = str(local(folder))
    for override in overrides:
        _check_group(override)
    with one_line():
        said = {override.get_key_element().lstrip("+~") for override in OverridesParser.create().parse_overrides(overrides)}
    saved = read_saved(folder)
    before = OmegaConf.to_container(saved)
    ConfigStore.instance().store(name="resumed", node=saved)
    composed = compose_config("resumed", overrides, None)
    if composed.trainer.strategy != "fsdp2" and "trainer.gather" not in said:
        composed.trainer.gather = "auto"  # which is how weights travel, where they do, and nothing of the run
    config = as_config(composed)
    assert isinstance(before, dict)
    if not config.trust_targets:
        check_trust(folder, asdict(config), said)
    changes = _changes(before, asdict(config))
    _check_changes(folder, changes)
    config.resume = folder
    return config, changes


def record(config: TrainConfig, step: int) -> Changes:
    """Make the config.yaml of config.resume say what applies from `step` on; a line of the history says what did before.

    Raises:
        ValueError: what differs cannot apply.
    """
    folder = Path(str(config.resume))
    changes = compared(config, str(folder))
    if changes:
        line = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "step": step, "changes": changes}
        with (folder / HISTORY).open("a", encoding="utf-8") as history:
            history.write(json.dumps(line) + "\n")
        save_config(config, folder)
    return changes


def compared(config: TrainConfig, folder: str) -> Changes:
    """What differs between a configuration and that of the run in `folder`.

    Raises:
        ValueError: it makes another run of it.
    """
    before = OmegaConf.to_container(read_saved(folder))
    assert isinstance(before, dict)
    changes = _changes(before, asdict(config))
    changes.pop("run.dir", None)  # of a Python caller, whose folder may have got another name
    _check_changes(folder, changes)
    return changes


def _check_group(override: str) -> None:
    """Refuse the choice of a group by name: a group says what differs from the defaults, not from a run."""
    key, _, name = override.lstrip("+~").partition("=")
    names = options().get(key)
    if names is None or name.startswith("{"):
        return
    if key == "recipe" or name not in names:
        raise ValueError(f"{override} does not go with resume=: a {key} is chosen when a run starts; set single keys instead")
    keys = _flat(OmegaConf.to_container(read_yaml(config_folder("conf") / key / f"{name}.yaml")), key)
    said = " ".join(quote(_setting(one, value)) for one, value in keys.items()) or f"for example {key}.KEY=value"
    raise ValueError(f"{override} does not go with resume=: a group is chosen when a run starts; set its keys instead: {said}")


def _setting(key: str, value: Any) -> str:
    """As it is typed; a key that the schema does not have is new to the run, or is not: ++ means both."""
    return f"{'' if key in KINDS else '++'}{key}={'null' if value is None else value}"


def _flat(node: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(node, dict) or not node and "." in prefix:
        return {prefix: node}
    return {key: value for name, inner in node.items() for key, value in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()}


def _changes(before: dict[Any, Any], after: dict[str, Any]) -> Changes:
    old, new = _flat(before, ""), _flat(after, "")
    keys = [key for key in {**old, **new} if key not in ASKED and old.get(key) != new.get(key)]
    return {key: (old.get(key), new.get(key)) for key in keys}


def _check_changes(folder: str, changes: Changes) -> None:
    for key, (old, new) in changes.items():
        parts = key.split(".")
        above = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        reason = next((why for name, why in REFUSED.items() if name in above), None)
        if reason and not above & ALLOWED.keys():
            raise ValueError(
                f"{key}={new} cannot apply to the run in {folder}, which has {key}={old}: {reason}; start another run for it"
            )
