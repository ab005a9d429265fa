"""The verb `python -m qat.export RUN --out PATH`: write a trained run in another format and prove it equal.

Plain flags, no Hydra. What a format cannot hold is an error here, since it was asked for by name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qat.config.flags import add_trust, run_verb
from qat.export.job import export as export
from qat.export.job import report
from qat.targets import FORMATS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qat.export", description="Write a trained run in another format.")
    parser.add_argument("run", metavar="RUN", help="folder of a run, or a packed folder of qat")
    readers = "; ".join(f"{name}: {record.reader}" for name, record in FORMATS.items())
    parser.add_argument("--format", choices=sorted(FORMATS), help=f"{readers} (default: by the suffix of --out)")
    paths = ", ".join(f"{name}: {record.path}" for name, record in FORMATS.items())
    parser.add_argument("--out", required=True, metavar="PATH", help=f"{paths}; an earlier export is replaced")
    for name, about in _options().items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=name.upper(), help=about)
    parser.add_argument("--text", default="pydoc_data.topics", help="text on which perplexity is compared")
    parser.add_argument("--max-tokens", type=int, default=16_384, help="how much of it (default: 16384)")
    add_trust(parser)
    return parser


def _options() -> dict[str, str]:
    """The formats' own options, each once, with what every format says of it."""
    found: dict[str, list[str]] = {}
    for format, record in FORMATS.items():
        for name, option in record.options.items():
            values = f": {', '.join(option.allowed)}" if option.allowed else ""
            found.setdefault(name, []).append(f"{format}: {option.help}{values}")
    return {name: "; ".join(parts) for name, parts in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after a user's error, which is one line on stderr."""
    args = vars(_parser().parse_args(arguments))
    return run_verb("export", lambda: print(*report(export(args.pop("run"), args.pop("out"), **args)), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
