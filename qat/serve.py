"""The verb `python -m qat.serve RUN [options]`: a packed model behind OpenAI's protocol, by transformers' own server.

What is not named here is an option of `transformers serve`. Stock bitnet folders need no qat: `transformers serve DIR`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from qat.config.flags import run_verb

KEY = "QAT_API_KEY"


def serve(run: str, options: Sequence[str] = (), *, key: str | None = None, waiting: int = 16) -> None:
    """As `qat.serving.server.serve`."""
    from qat.serving import server

    server.serve(run, options, key=key, waiting=waiting)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qat.serve",
        description="A packed model behind OpenAI's protocol: /v1/chat/completions and /v1/completions.",
        epilog="Further options are transformers serve's, such as --host, --port 8080, --device cpu, --continuous-batching.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or a packed folder of qat")
    parser.add_argument("--api-key", metavar="KEY", help=f"what clients must send as Authorization: Bearer KEY (default: ${KEY})")
    parser.add_argument("--max-waiting", type=int, default=16, help="requests that may wait; further ones get 429 (default: 16)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after a user's error, which is one line on stderr."""
    args, options = _parser().parse_known_args(arguments)
    key = args.api_key if args.api_key is not None else os.environ.get(KEY)
    return run_verb("serve", lambda: serve(args.run, options, key=key, waiting=args.max_waiting))


if __name__ == "__main__":
    sys.exit(main())
