"""The verb `python -m qat.evaluate MODEL`: what a model in whatever form is worth, by one and the same measure.

    --text FILE        perplexity over sliding windows
    --teacher MODEL    on that text: KL and top-1 agreement with it; with --layers also each layer's error
    --samples N        continuations of that text, side by side with the teacher's where one is given
    --tasks A,B        zero-shot tasks of lm-eval, on the very model that is loaded here

Plain flags, no Hydra: paths are not Hydra grammar. The measures are in `qat.metrics` and `qat.evaluation`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from qat.config.flags import add_model, run_verb

READERS = ("auto", "llama.cpp", "transformers")
_HOME = {
    "qat.metrics.perplexity": ("perplexity", "windows", "log_likelihood"),
    "qat.evaluation.measuring": ("evaluate", "samples", "Asked"),
    "qat.evaluation.report": ("lines",),
    "qat.evaluation.context": ("window_context",),
}


def __getattr__(name: str) -> Any:
    """What is measured lives in rooms; torch is imported when one is asked for, not for --help."""
    for home, names in _HOME.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'qat.evaluate' has no attribute {name!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qat.evaluate", description="What a model is worth, on a text or on tasks.")
    add_model(parser)
    parser.add_argument("--text", help=".txt, .jsonl or .parquet file, or pydoc_data.topics: perplexity on it")
    parser.add_argument("--context", type=int, help="tokens a window (default: 512, or the model's most)")
    parser.add_argument("--stride", type=int, help="tokens by which the window moves (default: the context)")
    parser.add_argument("--max-tokens", type=int, help="evaluate the first so many tokens (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows or task requests at once (default: 8)")
    parser.add_argument(
        "--reader", default="auto", choices=READERS, help="of a .gguf file (default: llama.cpp where it is installed and enough)"
    )
    parser.add_argument("--teacher", metavar="MODEL", help="compare with this model: KL, top-1 agreement")
    parser.add_argument("--layers", action="store_true", help="with --teacher: each quantized layer's relative error")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="print N continuations of the text")
    parser.add_argument("--tasks", type=_names, default=(), metavar="A,B", help="zero-shot tasks of lm-eval")
    parser.add_argument("--include-path", metavar="DIR", help="folder of task files, in place of those that lm-eval brings")
    parser.add_argument("--task-data", metavar="DIR", help="folder that these task files read (QAT_TASK_DATA)")
    parser.add_argument("--limit", type=int, help="the first so many examples of each task (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after a user's error, which is one line on stderr."""
    args = vars(_parser().parse_args(arguments))
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # stock unpacking is compiled at its first call: 19 s on a CPU
    as_json, path = args.pop("json"), args.pop("model")
    return run_verb("evaluate", lambda: _show(path, as_json, **args))


def _show(path: str, as_json: bool, **options: Any) -> None:
    from qat.evaluation.measuring import evaluate
    from qat.evaluation.report import lines

    result = evaluate(path, **options)
    print(json.dumps(result, indent=2) if as_json else "\n".join(lines(result)))


if __name__ == "__main__":
    sys.exit(main())
