"""The verb `python -m qat.inspect FILE_OR_FOLDER`: what is it, how are its weights stored, and who can read it.

`--verify OTHER` compares the codes and scales of two models, whatever their formats, and names the first difference. A folder or
file that is not as it was written is said to be altered, which is an error; `--reseal` says that it was on purpose.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qat.config.flags import run_verb


def inspect(path: str) -> dict[str, Any]:
    """What `path` is, as plain values; ValueError where it is damaged or of no known kind."""
    from qat.formats.inspection import report

    return report.inspect(path)


def verify(path: str, other: str) -> str:
    """`qat.formats.inspection.comparison.compare_codes`."""
    from qat.formats.inspection.comparison import compare_codes

    return compare_codes(path, other)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qat.inspect", description="What a model file or folder holds.")
    parser.add_argument("path", metavar="FILE_OR_FOLDER", help="run, packed folder, bitnet folder, .safetensors or .gguf file")
    parser.add_argument("--verify", metavar="OTHER", help="compare codes and scales with another; exit code 2 if they differ")
    parser.add_argument("--reseal", action="store_true", help="after an edit on purpose: write the checksums anew")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--trust-remote-code", action="store_true", help="as the other verbs take it; here no code is ever run")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after a user's error or a difference, which is one line on stderr."""
    args = _parser().parse_args(arguments)
    return run_verb("inspect", lambda: _show(args.path, args.verify, args.json, args.reseal))


def _show(path: str, other: str | None, as_json: bool, anew: bool) -> None:
    from qat.formats.inspection.report import examine, lines
    from qat.formats.inspection.seals import reseal

    if anew:
        reseal(Path(path))
    about, seal = examine(path)
    if as_json:
        print(json.dumps(about | ({"verify": verify(path, other)} if other else {}), indent=2))
    else:
        print(*lines(about), sep="\n")
        if other:
            print(*lines({"verify": verify(path, other)}))
    seal.refuse(path)


if __name__ == "__main__":
    sys.exit(main())
