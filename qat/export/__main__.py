"""The verb `python -m qat.export RUN --out PATH`: write a trained run in another format and prove it equal.

With --ptq --calibration FILE: any pretrained model, quantized without training, by settings of `quant` (granularity=channel).

Plain flags, no Hydra. What a format cannot hold is an error here, since it was asked for by name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from qat.config.flags import add_trust, run_verb
from qat.export.job import export as export
from qat.export.job import report
from qat.export.untrained import PACKED, export_untrained
from qat.targets import FORMATS

TEXT = "pydoc_data.topics"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qat.export", description="Write a trained run in another format.")
    parser.add_argument("run", metavar="RUN", help="folder of a run, or a packed folder of qat; with --ptq any pretrained model")
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="with --ptq: keys of quant, model.include, model.exclude"
    )
    parser.add_argument("--ptq", action="store_true", help="quantize a pretrained model without training, on --calibration")
    parser.add_argument("--calibration", metavar="FILE", help="with --ptq: text like that which the model will see")
    parser.add_argument("--calibration-tokens", type=int, metavar="N", help="how much of it, spread over it (default: 12288)")
    readers = "; ".join(f"{name}: {record.reader}" for name, record in FORMATS.items())
    about = f"{readers}; {PACKED}: qat itself, with --ptq (default: by the suffix of --out)"
    parser.add_argument("--format", choices=[*sorted(FORMATS), PACKED], help=about)
    paths = ", ".join(f"{name}: {record.path}" for name, record in FORMATS.items())
    parser.add_argument("--out", required=True, metavar="PATH", help=f"{paths}; an earlier export is replaced")
    for name, about in _options().items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=name.upper(), help=about)
    parser.add_argument(
        "--text", help=f"text on which perplexity is compared (default: {TEXT}; with --ptq the calibration text's end)"
    )
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
    args = vars(_parser().parse_intermixed_args(arguments))
    return run_verb("export", lambda: print(*report(_export(**args)), sep="\n"))


def _export(run: str, out: str, *, ptq: bool, **args: Any) -> dict[str, Any]:
    if ptq:
        return export_untrained(run, out, **args)
    for name in ("settings", "calibration", "calibration_tokens"):
        if value := args.pop(name):
            raise ValueError(f"{' '.join(value) if name == 'settings' else '--' + name.replace('_', '-')} belongs to --ptq")
    return export(run, out, **{**args, "text": args["text"] or TEXT})


if __name__ == "__main__":
    sys.exit(main())
