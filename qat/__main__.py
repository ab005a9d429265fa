"""`qat VERB ...` and `python -m qat VERB ...`: exactly what `python -m qat.VERB ...` does, with the verbs listed in one place."""

from __future__ import annotations

import os
import runpy
import sys
from difflib import get_close_matches

VERBS = {
    "train": ("qat.train", "from a pretrained model to trained, verified, packed, exported weights"),
    "evaluate": ("qat.evaluate", "perplexity, agreement with a teacher, samples, zero-shot tasks"),
    "generate": ("qat.generate", "continue a text, token by token"),
    "export": ("qat.export", "write a trained run in another format"),
    "inspect": ("qat.inspect", "what a model file or folder holds"),
    "serve": ("qat.serve", "transformers' server on a packed model"),
    "damage": ("qat.damage", "what quantizing each layer of a model costs before any training"),
    "report": ("qat.report", "the page of a run made anew, or of several beside each other"),
    "plan": ("qat.plan", "what limits a budget of tokens or hours, and the run that fits it"),
    "dashboard": ("qat.dashboard", "a W&B workspace and report of a project's runs, as code"),
    "bench": ("qat.bench", "kernels beside torch's own layers, with this machine's limits"),
    "build": ("qat.ops.build", "compile the kernels ahead of their first use"),
}
"""Verb -> its module and what it does."""


def help_text() -> str:
    """The verbs, a line each."""
    lines = [f"  {verb:<10}{what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(["qat VERB ...   (`qat VERB --help` says more; python -m qat.VERB is the same)\n", *lines])


def main() -> None:
    """Run a verb's module as `python -m` would, with the arguments behind the verb."""
    import qat

    if not hasattr(qat, "QuantConfig"):
        print(f"qat: {qat.__file__} is another distribution's, which hides or overwrote qat-bitlinear's", file=sys.stderr)
        sys.exit(2)
    verb, *rest = sys.argv[1:] or ["--help"]
    if "_ARGCOMPLETE" in os.environ:
        from qat.config.editing.completion import complete

        verb, rest = complete(VERBS), []
    if verb in ("-h", "--help"):
        return print(help_text())
    if verb == "--version":
        return print(f"qat-bitlinear {qat.__version__}")
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {near[0]}" if near else ""
        print(f"qat: there is no verb {verb!r}{hint}. Allowed: {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [sys.argv[0], *rest]
    runpy.run_module(VERBS[verb][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
