"""The verb `python -m qat.generate MODEL --prompt TEXT`: a model's continuation, streamed, with its speed and memory.

Plain flags, no Hydra: prompts are not Hydra grammar. The text goes to stdout, everything else to stderr. Packed models run
as `qat.inference.tiles` makes them: fused, and with a head of 6 or 8 bits if asked for.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from qat.config.flags import add_model, run_verb

_HOME = {
    "qat.nn.sampling": ("Sampling", "sampler", "nucleus"),
    "qat.generation.continuation": ("Continuation", "continue_tokens", "stop_tokens"),
    "qat.generation.memory": ("memory", "peak_bytes"),
    "qat.generation.job": ("generate", "ready", "prompt_ids", "room_for"),
}


def __getattr__(name: str) -> Any:
    """What the verb does lies in rooms; torch is imported when one is asked for, not for --help."""
    for home, names in _HOME.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'qat.generate' has no attribute {name!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qat.generate", description="Continue a text, token by token.")
    add_model(parser)
    parser.add_argument("--prompt", required=True, help="text to continue, or - to read it from stdin")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    parser.add_argument("--system", help="with --chat: the system message")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="stop after so many tokens (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest that reach this sum (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    return parser


def _generate(path: str, prompt: str, **options: Any) -> None:
    from qat.generation.job import generate

    generate(path, prompt, **options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after a user's error, which is one line on stderr."""
    args = vars(_parser().parse_args(arguments))
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # stock unpacking is compiled at its first call: 19 s on a CPU
    path, prompt = args.pop("model"), args.pop("prompt")
    return run_verb("generate", lambda: _generate(path, sys.stdin.read() if prompt == "-" else prompt, **args))


if __name__ == "__main__":
    sys.exit(main())
