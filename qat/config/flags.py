"""What the verbs with plain flags share: how a model is named on the command line, and how a user's error is shown.

Nothing heavy is imported here: `python -m qat.VERB --help` comes at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

HEAD_KINDS = ("full", "bf16", "8bit", "6bit")


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL, in any form that `qat.models.any.load` takes, and the bits of its output head (`qat.inference`)."""
    parser.add_argument(
        "model", metavar="MODEL", help="run folder, packed folder, Hugging Face folder, .gguf, hub id, package://NAME/FILE"
    )
    parser.add_argument(
        "--head", default="full", choices=HEAD_KINDS, help="bits of the output head: fewer are faster, less exact"
    )
    add_trust(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """--trust-remote-code, of every verb that loads a model."""
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the weights")


def run_verb(name: str, action: Callable[[], object]) -> int:
    """Run a verb; a ValueError or OSError, which users cause, becomes one line on stderr and exit code 2."""
    try:
        action()
    except (ValueError, OSError) as error:
        print(f"qat.{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"qat.{name}: interrupted", file=sys.stderr)
        return 130
    return 0
