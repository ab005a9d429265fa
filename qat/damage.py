"""The verb `python -m qat.damage MODEL --text FILE`: what quantization costs each layer of a model before any training.

It prints a table, and what would help the worst layers with its cost in bytes; `--picture` writes a page or a picture,
`--out` JSON.
Further words are settings as `qat.train` has them: `quant.granularity=channel`, `model.exclude=[...]`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qat.config.flags import add_verbose, run_verb


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qat.damage", description="What quantizing each layer costs, untrained.")
    parser.add_argument("settings", nargs="*", metavar="MODEL | key=value", help="a model, and keys, as qat.train has")
    parser.add_argument("--text", required=True, metavar="FILE", help=".txt, .jsonl or .parquet file to measure on")
    parser.add_argument("--tokens", type=int, default=4096, help="measure on the first so many (default: 4096)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the map as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the map as a page, .html, or a picture, .svg or .png")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    add_verbose(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after a user's error, which is one line on stderr."""
    args = _parser().parse_intermixed_args(arguments)
    return run_verb("damage", lambda: _show(args))


def _show(args: argparse.Namespace) -> None:
    if args.picture and args.picture.suffix not in (".html", ".svg", ".png"):
        raise ValueError(f"--picture {args.picture}: name it .html, .svg or .png")
    from rich.console import Console

    from qat.config.compose.command import parse
    from qat.config.compose.composing import compose_run
    from qat.evaluation.remedies import remedies_table, settings
    from qat.reporting.damage import measured, save
    from qat.reporting.damage.picture import check_picture
    from qat.reporting.plan import of_words

    if args.picture:
        check_picture(args.picture)
    given, assumed = of_words(args.settings)
    config = compose_run([*parse(given).settings, *assumed])
    if not config.model.path:
        raise ValueError("a model is missing: a folder, a .gguf file, a hub id, or recipe=NAME")
    found = measured(config, args.text, args.tokens)
    console = Console(highlight=False)
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        console.print(found.map.table(), remedies_table(found.remedies))
        console.print("to try: " + " or ".join(settings(found.remedies)), soft_wrap=True, markup=False)
    for file in save(found, args.out, args.picture):
        print(file, file=sys.stderr if args.json else sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
