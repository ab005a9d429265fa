"""python tests/faults [KIND ...] [--every N] [--only NAME]: all that may go wrong, tried; a table, and 1 for a broken promise."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from faults import disturbances, suites  # noqa: E402
from faults.cases import Case, Table  # noqa: E402
from faults.inputs import write_model, write_text  # noqa: E402
from faults.machine import Machine  # noqa: E402
from faults.scenes import announce, exports, runs  # noqa: E402


def _disturbed(kind: str, folder: Path) -> Iterator[Case]:
    words = announce(write_model(folder / "model"), write_text(folder / "text.txt"), folder)
    with Machine(folder) as machine:
        yield from disturbances.cases(kind, machine, [*runs(machine, words, folder), *exports(machine, words, folder)])


def _damaged(kind: str, folder: Path) -> Iterator[Case]:
    from faults.batches import readers_cases
    from faults.readers import READERS
    from faults.samples import write_all

    yield from readers_cases(READERS, write_all(folder / "samples"))


def _hostile(kind: str, folder: Path) -> Iterator[Case]:
    from faults.hostile import cases
    from faults.samples import write_all

    yield from cases(write_all(folder / "samples"))


KINDS = {
    **dict.fromkeys(disturbances.HARM, _disturbed),
    "readers": _damaged,
    "hostile": _hostile,
    **dict.fromkeys(suites.SUITES, suites.cases),
}


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th trial of each row only")
    parser.add_argument("--only", metavar="NAME", help="the one trial with this name, as a failure says it")
    parser.add_argument("--keep", metavar="FOLDER", help="work there, and leave what was made")
    args = parser.parse_args()
    if wrong := set(args.kinds) - set(KINDS):
        parser.error(f"{min(wrong)!r} is none of {', '.join(KINDS)}")
    start, table = time.monotonic(), Table()
    for kind in args.kinds or KINDS:
        with tempfile.TemporaryDirectory(prefix="faults-") as place:
            folder = Path(args.keep or place)
            os.environ["QAT_CACHE"] = str(folder / "qat-cache")
            table.run(kind, KINDS[kind](kind, folder), args.every, args.only)
    print(
        f"\n{table.text()}\n\n{sum(row.trials for row in table.rows.values()):,} trials, {len(table.failures)} failures, ", end=""
    )
    print(f"{time.monotonic() - start:.0f} s")
    return bool(table.failures)


if __name__ == "__main__":
    sys.exit(main())
