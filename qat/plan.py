"""The verb `python -m qat.plan [MODEL] [recipe=NAME] [key=value ...] --tokens N | --hours H`: what limits a budget.

It loads and converts the model as a run would, sizes updates, batch, warm-up and AdamW's second beta (by the measurements that
`qat.reporting.plan` names), and prints the command line of that run. With `--hours` it times a few steps on this machine.
With `--on DEVICE` it says what the run takes on devices that are not here, and loads no weights (`qat.planning`).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from qat.config.flags import add_verbose, run_verb

_SIZES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def _count(text: str) -> int:
    """A number of tokens: 1600000, 1.6M, 1e6, 2B."""
    found = re.fullmatch(r"(\d+(?:[._]?\d+)*(?:e\d{1,2})?)([kmb]?)", text.strip().lower().replace(",", ""))
    if found is None or (value := float(found[1].replace("_", "")) * _SIZES[found[2]]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; write 1600000, 1.6M or 2B")
    return round(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qat.plan", description="What limits a budget, and the run that fits it.")
    parser.add_argument(
        "settings", nargs="*", metavar="MODEL | key=value", help="a model, recipe=NAME, and keys, as qat.train has"
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--tokens", type=_count, metavar="N", help="tokens to train on: 1600000, 1.6M, 2B")
    budget.add_argument("--hours", type=float, metavar="H", help="hours on this machine, by a few timed steps")
    about = "plan for such devices, as many as trainer.devices and trainer.num_nodes say, by the model's config alone: h100, or"
    parser.add_argument("--on", metavar="DEVICE", help=f"{about} h100,memory=94,wire=25 (GiB, GB/s); MODEL may be a size, as 70b")
    add_verbose(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after a user's error, which is one line on stderr."""
    args = _parser().parse_intermixed_args(arguments)
    if args.on and args.tokens is None:
        _parser().error("--on needs --tokens: hours are its answer")
    return run_verb("plan", lambda: _show(args.settings, args.tokens, args.hours, args.on))


def _show(words: list[str], tokens: int | None, hours: float | None, on: str | None) -> None:
    from qat.bench.clusters import show
    from qat.bench.planning import planned
    from qat.config.compose.command import parse
    from qat.config.compose.composing import compose_run
    from qat.reporting.plan import command_line, of_words, print_plan

    settings, assumed = of_words(words)
    config = compose_run([*parse(settings).settings, *assumed])
    if on is not None:
        return show(config, tokens or 0, on)
    plan = planned(config, tokens, hours)
    print_plan(plan, command_line(plan, config, settings, assumed))


if __name__ == "__main__":
    sys.exit(main())
