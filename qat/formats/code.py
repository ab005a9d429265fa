"""Models whose Python code lies beside their weights (`auto_map` in config.json, transformers' `trust_remote_code`).

What such a model leaves must carry its code, or nobody could load it, this run's own checks included; and what carries code must
not be run without a word. transformers would ask on the terminal, where nobody may sit, and it would load a class of its own
where one has the same name. Here a folder is loaded with its code where trust was said, and refused in one line otherwise.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LOADED = "transformers_modules."
"""transformers imports such code as modules below this name."""
_AUTO = {"config": "AutoConfig", "model": "AutoModelForCausalLM"}
TRUST = "--trust-remote-code (in a run: model.trust_remote_code=true)"


def is_custom(thing: Any) -> bool:
    """Whether a model, configuration or tokenizer is of a class that came with its weights."""
    return type(thing).__module__.startswith(_LOADED)


def save_code(model: Any, config: Any, folder: Path) -> None:
    """Write the Python files that `model` and `config` need to be loaded from `folder`, and name them in the config's `auto_map`.

    Of a model of transformers' own, whose source had an `auto_map` all the same, the map is taken out.
    """
    custom = {_AUTO[what]: thing for what, thing in (("config", config), ("model", model)) if is_custom(thing)}
    given = config.__dict__.pop("auto_map", None) or {}
    if not custom:
        return
    places = [Path(str(sys.modules[type(thing).__module__].__file__)).parent for thing in custom.values()]
    named = {key: value.rpartition("--")[2] for key, value in given.items() if isinstance(value, str)}
    named |= {key: f"{type(thing).__module__.rpartition('.')[2]}.{type(thing).__name__}" for key, thing in custom.items()}
    config.auto_map = {}
    for key, value in named.items():
        files = [place / f"{value.partition('.')[0]}.py" for place in places]
        if file := next((file for file in files if file.is_file()), None):  # transformers keeps those that it used
            _copy(file, folder)
            config.auto_map[key] = value


def _copy(file: Path, folder: Path) -> None:
    """A module and those that it imports relatively."""
    from transformers.dynamic_module_utils import get_relative_import_files

    for one in (file, *map(Path, get_relative_import_files(file))):
        shutil.copyfile(one, folder / one.name)


def check_trust(folder: Path, config: Mapping[str, Any], trust: bool) -> None:
    """Raise ValueError where the folder's config names code that lies there, unless it is trusted."""
    named = config.get("auto_map")
    if trust or not isinstance(named, Mapping):
        return
    modules = {str(value).rpartition("--")[2].partition(".")[0] for value in named.values()}
    for module in sorted(modules):
        if (folder / f"{module}.py").exists():
            raise ValueError(f"{folder} brings Python code ({module}.py), which loading would run; if you trust it, say {TRUST}")
