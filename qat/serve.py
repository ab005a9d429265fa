"""The verb `python -m qat.serve RUN [options]`: transformers' own server, which speaks OpenAI's protocol, on a packed model.

`transformers serve` alone stops at our folders: it discovers no plug-ins, neither entry points nor a folder's own code name a
quantizer, and `--trust-remote-code` covers configs, models and tokenizers only. Its process has to import qat, which is all that
this verb adds. Stock bitnet folders need no qat: `transformers serve DIR`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from qat.config.flags import run_verb
from qat.models.any import packed_folder

_NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")


def serve(run: str, options: Sequence[str] = ()) -> None:
    """Serve the packed model of `run` until interrupted. Clients name it by the path that is printed, or not at all.

    Args:
        run: a run folder (its `packed/` is used) or a packed folder.
        options: of `transformers serve`, such as `["--port", "8080"]`.

    Raises:
        ValueError: `run` is no such folder, a package is missing, or the folder cannot be loaded.
    """
    folder = packed_folder(run)
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"serving needs the package {missing[0]}: pip install -e .[serve]")
    import typer
    from transformers.cli.serve import Serve

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help="transformers serve, with qat's packed folders")(Serve)
    print(f'qat.serve: the model\'s name for clients is "{folder}"', flush=True)
    app([str(folder), *options], prog_name="python -m qat.serve")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after a user's error, which is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m qat.serve", description="transformers serve on a packed model.")
    parser.add_argument("run", metavar="RUN", help="folder of a run, or a packed folder of qat")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="transformers serve's, such as --port 8080")
    args = parser.parse_args(arguments)
    return run_verb("serve", lambda: serve(args.run, args.options))


if __name__ == "__main__":
    sys.exit(main())
