"""The verb `python -m qat.evaluate MODEL --text FILE`: perplexity of whatever form a model is in, by one and the same measure.

Plain flags, no Hydra: paths are not Hydra grammar. The measure itself is in `qat.perplexity`, which needs torch alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn

    from qat.perplexity import log_likelihood as log_likelihood
    from qat.perplexity import perplexity as perplexity
    from qat.perplexity import windows as windows

DEFAULT_CONTEXT = 512


def __getattr__(name: str) -> Any:
    """`perplexity` and its parts live in qat.perplexity; torch is imported when one is asked for, not for --help."""
    if name in ("perplexity", "windows", "log_likelihood"):
        from qat import perplexity as home

        return getattr(home, name)
    raise AttributeError(f"module 'qat.evaluate' has no attribute {name!r}")


class Loaded(NamedTuple):
    """A model ready to evaluate, its tokenizer, and what it was found to be."""

    model: nn.Module
    tokenizer: Any
    kind: str


def load(path: str) -> Loaded:
    """Find out what `path` is and load it.

    A run folder (its `packed/` is used), a packed folder, a stock bitnet folder, or anything that `qat.models.load_model`
    takes: a folder in full precision, a .gguf file, `package://NAME/FILE`, a hub id.

    Raises:
        ValueError: it cannot be loaded, or a stock folder's keys do not fit its model.
    """
    folder = Path(path).expanduser()
    if (folder / "packed").is_dir():  # where it is damaged, loading names the file
        return _load_packed(folder / "packed", f"packed model of the run {folder}")
    if _quant_method(folder) == "qat":
        return _load_packed(folder, "packed model of qat")
    if _quant_method(folder) == "bitnet":
        return _load_stock(folder)
    return _load_full(path)


def _load_packed(folder: Path, kind: str) -> Loaded:
    from qat.export.packed import load as load_packed

    return Loaded(load_packed(folder), _tokenizer(str(folder)), kind)


def _load_full(path: str) -> Loaded:
    from qat.config import ModelConfig
    from qat.models import load_model

    return Loaded(load_model(ModelConfig(path=path)), _tokenizer(path), "full precision (float32)")


def _load_stock(folder: Path) -> Loaded:
    """With stock transformers, as a user would, but its warnings about keys are errors."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    reader: Any = AutoModelForCausalLM
    try:
        model, report = reader.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # transformers raises nearly any class here
        raise ValueError(f"cannot load the model {folder}: {' '.join(str(error).split())[:300]}") from error
    wrong = [f"{what.replace('_', ' ')} {sorted(map(str, report[what]))[0]}" for what in _REPORTED if report[what]]
    if wrong:
        raise ValueError(f"{folder} does not fit its own config: {'; '.join(wrong)}")
    linear_class = model.config.quantization_config.linear_class
    return Loaded(
        model.eval(), _tokenizer(str(folder)), f"stock bitnet folder (linear_class {linear_class}), read by transformers"
    )


_REPORTED = ("missing_keys", "unexpected_keys", "mismatched_keys")


def _tokenizer(path: str) -> Any:
    from qat.config import ModelConfig
    from qat.models import load_tokenizer

    return load_tokenizer(ModelConfig(path=path))


def _quant_method(folder: Path) -> str | None:
    """What a local folder's config.json says about quantization; None where it says nothing or is not there."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config["quantization_config"]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def evaluate(
    path: str,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Load `path` and measure its perplexity on `text`, a file or the name `pydoc_data.topics`.

    Args:
        context: tokens a window; default: 512, or the model's largest position where that is less.
        stride: default: the context, so that windows do not overlap.
        max_tokens: evaluate the first so many tokens of the text; default: all.

    Returns:
        {"perplexity", "text", "context", "stride", "tokens", "scored_tokens", "model", "kind"}.

    Raises:
        ValueError: the model or the text cannot be read, the context is out of range, or a logit is not finite.
    """
    from qat.config import DataConfig
    from qat.data import text_tokens
    from qat.perplexity import exp_mean, log_likelihood, windows

    found = load(path)
    context = _context(found.model, context)
    stride = context if stride is None else stride
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"--max-tokens={max_tokens} is not allowed; it must be at least 2")
    tokens = text_tokens(text, found.tokenizer, DataConfig(), max_tokens)
    total, scored = log_likelihood(found.model, windows(tokens, context, stride, batch_size))
    name = Path(text).name if Path(text).expanduser().exists() else text
    result = {"perplexity": exp_mean(total, scored), "text": name, "context": context, "stride": stride}
    return {**result, "tokens": len(tokens), "scored_tokens": scored, "model": path, "kind": found.kind}


def _context(model: Any, context: int | None) -> int:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return min(most or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if most is not None and context > most:
        raise ValueError(f"--context {context} is above the model's {most} positions")
    return context


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qat.evaluate", description="Perplexity of a model on a text.")
    parser.add_argument(
        "model", metavar="MODEL", help="run folder, packed folder, Hugging Face folder, .gguf, hub id, package://NAME/FILE"
    )
    parser.add_argument("--text", required=True, help=".txt, .jsonl or .parquet file, or pydoc_data.topics")
    parser.add_argument("--context", type=int, help="tokens a window (default: 512, or the model's most)")
    parser.add_argument("--stride", type=int, help="tokens by which the window moves (default: the context)")
    parser.add_argument("--max-tokens", type=int, help="evaluate the first so many tokens (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows at once (default: 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after a user's error, which is one line on stderr."""
    args = vars(_parser().parse_args(arguments))
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # stock unpacking is compiled at its first call: 19 s on a CPU
    as_json, path = args.pop("json"), args.pop("model")
    return run_verb("evaluate", lambda: _show(evaluate(path, **args), as_json))


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['model']}: {result['kind']}")
    print(
        f"perplexity {result['perplexity']:.6g} on {result['text']} ({result['tokens']} tokens,"
        f" context {result['context']}, stride {result['stride']})"
    )


def run_verb(name: str, action: Callable[[], None]) -> int:
    """Run a verb; a ValueError or OSError, which users cause, becomes one line on stderr and exit code 2."""
    try:
        action()
    except (ValueError, OSError) as error:
        print(f"qat.{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"qat.{name}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
