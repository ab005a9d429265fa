"""The verb `python -m qat.export RUN --format hf --out DIR`: write a trained run in another format and prove it equal.

Plain flags, no Hydra. What a format cannot hold is an error here, since it was asked for by name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.config.flags import run_verb
from qat.evaluation.context import window_context
from qat.formats import FORMATS, get_format
from qat.models.any import packed_folder

if TYPE_CHECKING:
    from qat.metrics.perplexity import Window

_PROBES = 4
_PROBE_LENGTH = 64


def export(
    run: str,
    out: str,
    *,
    format: str = "hf",
    text: str = "pydoc_data.topics",
    max_tokens: int = 16_384,
    **options: Any,
) -> dict[str, Any]:
    """Write the packed model of `run` to `out`, and read it back with the format's stock reader.

    Args:
        run: a run folder (its `packed/` is used) or a packed folder.
        out: a folder, or a file for gguf and pt2; an earlier export is replaced; it appears only when what was read is equal.
        text: a file or `pydoc_data.topics`; perplexity is compared on its first `max_tokens` tokens.
        options: keywords of the format's `save`; None is the format's default.

    Returns:
        what the format's `save` returned (with "verification"), "replaced": whether something was there, and "sizes".

    Raises:
        ValueError: `run` is no such folder, the format cannot hold the model or lacks an option, or what was read back differs.
    """
    folder = packed_folder(run)
    writer = get_format(format)
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(set(given) - set(writer.OPTIONS)):
        raise ValueError(f"--{unknown[0].replace('_', '-')} does not fit --format {format}, only {_owner(unknown[0])}")
    from qat.config import ModelConfig
    from qat.formats.packed import folder as packed
    from qat.models.hub import load_tokenizer

    model, tokenizer = packed.load(folder), load_tokenizer(ModelConfig(path=str(folder)))
    windows = _windows(model, tokenizer, text, max_tokens)
    probes = windows[0][0][:_PROBES, :_PROBE_LENGTH]
    facts = {**packed.read_extra(folder).get("card", {}), **_results(Path(run))}
    replaced = Path(out).expanduser().exists()
    info = writer.save(model, out, tokenizer, **given, card=facts, check=lambda new: writer.verify(new, model, probes, windows))
    about = f"the first {max_tokens:,} tokens of {Path(text).name}"
    return {**info, "format": format, "replaced": replaced, "text": about, "sizes": packed.sizes(folder)}


def _owner(option: str) -> str:
    return next((name for name in FORMATS if option in get_format(name).OPTIONS), "no format")


def _windows(model: Any, tokenizer: Any, text: str, max_tokens: int) -> list[Window]:
    from qat.config import DataConfig
    from qat.data import text_tokens
    from qat.metrics.perplexity import windows

    return list(windows(text_tokens(text, tokenizer, DataConfig(), max_tokens), window_context(model)))


def _results(run: Path) -> dict[str, Any]:
    """For the card: the perplexities in the run's result.json, where there is one."""
    try:
        return {"results": json.loads((run / "result.json").read_text(encoding="utf-8"))["perplexity"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qat.export", description="Write a trained run in another format.")
    parser.add_argument("run", metavar="RUN", help="folder of a run, or a packed folder of qat")
    readers = "hf: stock transformers; gguf: llama.cpp; pt2: torch without transformers"
    parser.add_argument("--format", default="hf", choices=sorted(FORMATS), help=readers)
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="hf: a folder, gguf: NAME.gguf, pt2: NAME.pt2; an earlier export is replaced"
    )
    parser.add_argument("--linear-class", help="hf: scale convention, bitlinear (default) or autobitlinear")
    parser.add_argument("--type", help="gguf: auto (default), tq1_0, tq2_0, q2_0, q1_0, i2_s (x86) or i2_s_arm")
    parser.add_argument("--floats", help="gguf: embeddings, head and full-precision layers: f16 (default), f32, bf16, q8_0, q6_k")
    parser.add_argument("--pre-tokenizer", metavar="NAME", help="gguf: llama.cpp's name of the text split, if not recognized")
    parser.add_argument("--kind", help="pt2: exported (default), or compiled by AOTInductor for this CPU")
    parser.add_argument("--text", default="pydoc_data.topics", help="text on which perplexity is compared")
    parser.add_argument("--max-tokens", type=int, default=16_384, help="how much of it (default: 16384)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after a user's error, which is one line on stderr."""
    args = vars(_parser().parse_args(arguments))
    return run_verb("export", lambda: _show(export(args.pop("run"), args.pop("out"), **args)))


def _show(info: dict[str, Any]) -> None:
    sizes = info["sizes"]
    if info["format"] == "gguf":
        from qat.formats.gguf.verify import report

        print(*report(info), sep="\n")
    elif info["format"] == "pt2":
        from qat.formats.pt2.writing import report

        print(*report(info), sep="\n")
    else:
        _show_hf(info)
    if info["replaced"]:
        print("the earlier export there is replaced")
    print(
        f"bytes: {sizes['full_precision_bf16']:,} in bf16, {sizes['packed_model']:,} packed"
        f" (of which {sizes['packed_linears']:,} the quantized layers)"
    )


def _show_hf(info: dict[str, Any]) -> None:
    found = info["verification"]
    print(f"wrote {info['folder']} (linear_class {info['linear_class']}, {info['bytes']:,} bytes of weights)")
    if "padding" in info:
        print(info["padding"])
    print(
        f"read back by stock transformers, on {info['text']}:"
        f" perplexity {found['perplexity']:.6g}, packed {found['perplexity_packed']:.6g}"
        f" (relative difference {found['perplexity_difference']:.1e}); logits differ by {found['logits_difference']:.1e},"
        f" single layers by {found['layers_difference']:.1e}"
    )
    print(f"loaded as bfloat16 its perplexity is {found['perplexity_bfloat16']:.6g}")


if __name__ == "__main__":
    sys.exit(main())
