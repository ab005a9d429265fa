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
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.config.flags import add_model, run_verb
from qat.evaluation.context import window_context
from qat.models.any import Loaded, load

if TYPE_CHECKING:
    from torch import Tensor

    from qat.metrics.perplexity import Window
    from qat.metrics.perplexity import log_likelihood as log_likelihood
    from qat.metrics.perplexity import perplexity as perplexity
    from qat.metrics.perplexity import windows as windows

READERS = ("auto", "llama.cpp", "transformers")
_PROMPT_TOKENS = 32
_WORST_LAYERS = 10


def __getattr__(name: str) -> Any:
    """`perplexity` and its parts live in qat.metrics.perplexity; torch is imported when one is asked for, not for --help."""
    if name in ("perplexity", "windows", "log_likelihood"):
        from qat.metrics import perplexity as home

        return getattr(home, name)
    raise AttributeError(f"module 'qat.evaluate' has no attribute {name!r}")


@dataclass
class Asked:
    """What to measure beside perplexity; checked before anything is loaded."""

    text: str | None = None
    teacher: str | None = None
    trust_remote_code: bool = False
    layers: bool = False
    samples: int = 0
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    task_data: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.text is None and not self.tasks:
            raise ValueError("nothing to measure: give --text FILE, --tasks NAMES, or both")
        if self.text is None and (self.teacher or self.samples):
            raise ValueError("--teacher and --samples are measured on a text: give --text FILE")
        if self.layers and not self.teacher:
            raise ValueError("--layers compares with full precision: give --teacher MODEL")
        if self.samples < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"--samples {self.samples} and --limit {self.limit} are not allowed: at least 0, at least 1")
        if not self.tasks and (self.include_path or self.task_data or self.limit):
            raise ValueError("--include-path, --task-data and --limit belong to --tasks NAMES")

    def needs_pytorch(self, head: str) -> list[str]:
        """The flags that only a model of PyTorch can answer."""
        flags = {"--layers": self.layers, "--samples": self.samples, "--tasks": self.tasks, "--head": head != "full"}
        return [flag for flag, given in flags.items() if given]


def evaluate(
    path: str,
    text: str | None = None,
    *,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    head: str = "full",
    reader: str = "auto",
    trust_remote_code: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Load `path` and measure it on `text`, a file or the name `pydoc_data.topics`.

    Args:
        context: tokens a window; default: 512, or the model's largest position where that is less.
        stride: default: the context, so that windows do not overlap.
        max_tokens: evaluate the first so many tokens of the text; default: all.
        head: `bf16`, `8bit` or `6bit`: with the output head in fewer bits, as `qat.generate` has it.
        reader: of a .gguf file: `llama.cpp` or `transformers`, see `qat.evaluation.llamacpp`.
        trust_remote_code: whether Python code that comes with the weights, of the teacher too, may run.
        more: the fields of `Asked`.

    Returns:
        {"model", "kind"}, and for a text {"perplexity", "text", "context", "stride", "tokens", "scored_tokens"}; where asked
        for, "teacher", "samples" and "tasks"; "reader" of a .gguf file; "remark" where the text is shorter than one window.

    Raises:
        ValueError: a model or the text cannot be read, the context is out of range, or a logit is not finite.
    """
    asked = Asked(text, trust_remote_code=trust_remote_code, **more)
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"--max-tokens={max_tokens} is not allowed; it must be at least 2")
    from qat.evaluation import llamacpp as runtime

    chosen = runtime.choose_reader(path, reader, asked.needs_pytorch(head))
    found = runtime.load(path) if chosen == "llama.cpp" else load(path, trust_remote_code=trust_remote_code)
    if head != "full":
        from qat.inference.digits import quantize_head

        quantize_head(found.model, head)
    result: dict[str, Any] = {"reader": chosen} if chosen else {}
    if asked.text is not None:
        result |= _on_text(found, asked, context, stride, max_tokens, batch_size)
    if asked.tasks:
        from qat.evaluation.zeroshot import run_tasks

        result["tasks"] = run_tasks(found, asked.tasks, asked.include_path, asked.task_data, asked.limit, batch_size)
    return {**result, "model": path, "kind": found.kind if head == "full" else f"{found.kind}, {head} head"}


def _on_text(
    found: Loaded, asked: Asked, context: int | None, stride: int | None, max_tokens: int | None, batch_size: int
) -> dict[str, Any]:
    from qat.config import DataConfig
    from qat.data import text_tokens
    from qat.metrics.perplexity import exp_mean, log_likelihood, windows

    assert asked.text is not None
    context = window_context(found.model, context)
    stride = context if stride is None else stride
    tokens = text_tokens(asked.text, found.tokenizer, DataConfig(), max_tokens)
    batches = list(windows(tokens, context, stride, batch_size))
    own = getattr(found.model, "log_likelihood", None)  # of a model that runs elsewhere
    total, scored = own(batches) if own else log_likelihood(found.model, batches)
    name = Path(asked.text).name if Path(asked.text).expanduser().exists() else asked.text
    result = {"perplexity": exp_mean(total, scored), "text": name, "context": context, "stride": stride}
    result |= {"tokens": len(tokens), "scored_tokens": scored}
    if len(tokens) < context:
        result["remark"] = f"the text is shorter than one window: its {len(tokens)} tokens are measured as one"
    teacher = load(asked.teacher, trust_remote_code=asked.trust_remote_code) if asked.teacher else None
    if teacher is not None:
        _same_tokens(found, teacher)
        result["teacher"] = {"model": asked.teacher, "kind": teacher.kind, **_compare(found, teacher, batches, asked.layers)}
    if asked.samples:
        result["samples"] = samples(found, teacher, _prompts(tokens, asked.samples))
    return result


def _same_tokens(found: Loaded, teacher: Loaded) -> None:
    if found.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ValueError("--teacher has another vocabulary than the model; their predictions cannot be compared")


def _compare(found: Loaded, teacher: Loaded, batches: Sequence[Window], layers: bool) -> dict[str, Any]:
    from qat.metrics.agreement import agreement, layer_errors
    from qat.metrics.perplexity import exp_mean

    close = agreement(found.model, teacher.model, batches)
    result: dict[str, Any] = {"perplexity": exp_mean(close.reference_nll, 1), "kl": close.kl, "top1": close.top1}
    if layers:
        errors = layer_errors(found.model, teacher.model, batches[0][0])
        result["layers"] = {name: error._asdict() for name, error in errors.items()}
    return result


def _prompts(tokens: Tensor, count: int) -> list[Tensor]:
    """`count` stretches of tokens, spread evenly over the text."""
    step = len(tokens) // count
    if step < 1:
        raise ValueError(f"--samples {count} are more than the text has tokens")
    return [tokens[i * step : i * step + min(_PROMPT_TOKENS, step)] for i in range(count)]


def samples(found: Loaded, teacher: Loaded | None, prompts: Sequence[Tensor], new_tokens: int = 48) -> list[dict[str, str]]:
    """The likeliest continuation of each prompt int64 [T]: {"prompt", "continuation", "teacher"} as texts."""
    from qat.inference.decode import Decoder, greedy

    texts = []
    for prompt in prompts:
        entry = {"prompt": found.tokenizer.decode(prompt)}
        for name, one in (("continuation", found), ("teacher", teacher)):
            if one is not None:
                entry[name] = one.tokenizer.decode(greedy(Decoder(one.model, len(prompt) + new_tokens), prompt, new_tokens))
        texts.append(entry)
    return texts


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
    return run_verb("evaluate", lambda: _show(evaluate(path, **args), as_json))


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print("\n".join(lines(result)))


def lines(result: dict[str, Any]) -> list[str]:
    """What a person reads of `evaluate`'s result."""
    text = [f"{result['model']}: {result['kind']}"]
    if "perplexity" in result:
        text.append(
            f"perplexity {result['perplexity']:.6g} on {result['text']} ({result['tokens']} tokens,"
            f" context {result['context']}, stride {result['stride']})"
        )
    if "remark" in result:
        text.append(result["remark"])
    if "teacher" in result:
        text += _teacher_lines(result["teacher"])
    for sample in result.get("samples", ()):
        text += ["", f"prompt: {sample['prompt']!r}", f"model:   {sample['continuation']!r}"]
        text += [f"teacher: {sample['teacher']!r}"] if "teacher" in sample else []
    for name, metrics in result.get("tasks", {}).items():
        text.append(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
    return text


def _teacher_lines(teacher: dict[str, Any]) -> list[str]:
    text = [
        f"teacher {teacher['model']}: {teacher['kind']}, perplexity {teacher['perplexity']:.6g};"
        f" KL {teacher['kl']:.4g} nats a token, top-1 agreement {teacher['top1']:.1%}"
    ]
    errors = teacher.get("layers")
    if errors:
        local = sorted(errors, key=lambda name: -errors[name]["local"])
        middle = [statistics.median(error[kind] for error in errors.values()) for kind in ("local", "accumulated")]
        text.append(
            f"relative error of {len(errors)} layers: median {middle[0]:.3f} local, {middle[1]:.3f} accumulated; largest local:"
        )
        text += [
            f"  {name}: {errors[name]['local']:.3f} local, {errors[name]['accumulated']:.3f} accumulated"
            for name in local[:_WORST_LAYERS]
        ]
    return text


if __name__ == "__main__":
    sys.exit(main())
