"""What a model in whatever form is worth, on a text and on tasks: one job, whose parts are asked for one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.config import DataConfig
from qat.data import text_tokens
from qat.evaluation import llamacpp as runtime
from qat.evaluation.context import window_context
from qat.evaluation.zeroshot import run_tasks
from qat.inference.decode import Decoder, greedy
from qat.metrics.agreement import agreement, layer_errors
from qat.metrics.perplexity import Window, exp_mean, log_likelihood, windows
from qat.models.any import Loaded, load
from qat.models.heads import refuse_classifier
from qat.storage import local
from qat.terminal.stage import stage, tracked

_PROMPT_TOKENS = 32


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
    chosen = runtime.choose_reader(path, reader, asked.needs_pytorch(head))
    with stage(f"loading {path}"):
        found = runtime.load(path) if chosen == "llama.cpp" else load(path, trust_remote_code=trust_remote_code)
    refuse_classifier(found.model, path)
    if head != "full":
        from qat.inference.digits import quantize_head

        quantize_head(found.model, head)
    result: dict[str, Any] = {"reader": chosen} if chosen else {}
    if asked.text is not None:
        result |= _on_text(found, asked, context, stride, max_tokens, batch_size)
    if asked.tasks:
        with stage(f"zero-shot tasks {', '.join(asked.tasks)}"):
            result["tasks"] = run_tasks(found, asked.tasks, asked.include_path, asked.task_data, asked.limit, batch_size)
    return {**result, "model": path, "kind": found.kind if head == "full" else f"{found.kind}, {head} head"}


def _on_text(
    found: Loaded, asked: Asked, context: int | None, stride: int | None, max_tokens: int | None, batch_size: int
) -> dict[str, Any]:
    assert asked.text is not None
    context = window_context(found.model, context)
    stride = context if stride is None else stride
    tokens = text_tokens(asked.text, found.tokenizer, DataConfig(), max_tokens)
    batches = list(windows(tokens, context, stride, batch_size))
    own = getattr(found.model, "log_likelihood", None)  # of a model that runs elsewhere
    name = Path(asked.text).name if local(asked.text).exists() else asked.text
    with stage(f"perplexity on {name}", len(batches), "batches") as shown:
        total, scored = own(batches) if own else log_likelihood(found.model, shown.each(batches))
    result = {"perplexity": exp_mean(total, scored), "text": name, "context": context, "stride": stride}
    result |= {"tokens": len(tokens), "scored_tokens": scored}
    if len(tokens) < context:
        result["remark"] = f"the text is shorter than one window: its {len(tokens)} tokens are measured as one"
    teacher = _load_teacher(asked) if asked.teacher else None
    if teacher is not None:
        _same_tokens(found, teacher)
        result["teacher"] = {"model": asked.teacher, "kind": teacher.kind, **_compare(found, teacher, batches, asked.layers)}
    if asked.samples:
        result["samples"] = samples(found, teacher, _prompts(tokens, asked.samples))
    return result


def _load_teacher(asked: Asked) -> Loaded:
    with stage(f"loading {asked.teacher}"):
        return load(str(asked.teacher), trust_remote_code=asked.trust_remote_code)


def _same_tokens(found: Loaded, teacher: Loaded) -> None:
    if found.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ValueError("--teacher has another vocabulary than the model; their predictions cannot be compared")


def _compare(found: Loaded, teacher: Loaded, batches: Sequence[Window], layers: bool) -> dict[str, Any]:
    with stage("comparing with the teacher", len(batches), "batches") as shown:
        close = agreement(found.model, teacher.model, shown.each(batches))
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
    texts = []
    for prompt in tracked(prompts, "continuing prompts", "prompts"):
        entry = {"prompt": found.tokenizer.decode(prompt)}
        for name, one in (("continuation", found), ("teacher", teacher)):
            if one is not None:
                entry[name] = one.tokenizer.decode(greedy(Decoder(one.model, len(prompt) + new_tokens), prompt, new_tokens))
        texts.append(entry)
    return texts
