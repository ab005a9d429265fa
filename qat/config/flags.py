"""What the verbs with plain flags share: how a model is named on the command line, and how a user's error is shown.

Nothing heavy is imported here: `python -m qat.VERB --help` comes at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

VERBOSE = "QAT_VERBOSE"
"""Environment variable, set by -v: say in full which kernels serve, and from where."""
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
    add_verbose(parser)


class _Heard(argparse.Action):
    """Sets the variable, as what it asks for happens far below; it is no argument of what the verb does."""

    def __call__(self, *_: object) -> None:
        os.environ[VERBOSE] = "1"


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """-v, of every verb that computes."""
    about = "say which kernels serve, and from where"
    parser.add_argument("-v", "--verbose", nargs=0, action=_Heard, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help=about)


def heard(arguments: Sequence[str]) -> list[str]:
    """The arguments without -v, which is done: for a verb whose other flags are not argparse's."""
    rest = [one for one in arguments if one not in ("-v", "--verbose")]
    if len(rest) < len(arguments):
        os.environ[VERBOSE] = "1"
    return rest


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
