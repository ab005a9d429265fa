"""Zero-shot tasks by lm-eval (EleutherAI's harness), on a model that is already loaded, whatever form it came in.

lm-eval's own Hugging Face class asks the questions; nothing of a task is written here. With a folder of task files
(`--include-path`) only those are known, so that nothing is looked up on the hub; they find their data by the environment variable
QAT_TASK_DATA. benchmarks/tasks holds three such files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qat.models.any import Loaded
from qat.storage import local
from qat.terminal.stage import stage

DATA = "QAT_TASK_DATA"


def run_tasks(
    found: Loaded,
    tasks: Sequence[str],
    include_path: str | None = None,
    data: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, with `<metric>_stderr` and `examples` beside them.

    Raises:
        ValueError: lm-eval is not installed, a folder is missing, a task is unknown or cannot be run; with what is allowed.
    """
    for name, folder in (("--include-path", include_path), ("--task-data", data)):
        if folder is not None and not local(folder).is_dir():
            raise ValueError(f"{name} {folder}: there is no such folder")
    lm_eval, manager = _harness(include_path)
    known = set(manager.all_tasks)
    unknown = [task for task in tasks if task not in known]
    if unknown:
        shown = ", ".join(sorted(known)) if include_path else "those that lm-eval brings along"
        raise ValueError(f"--tasks: {unknown[0]!r} is not known; choose from {shown}")
    if found.tokenizer.bos_token_id is None and found.tokenizer.eos_token_id is None:
        raise ValueError("--tasks: the tokenizer has neither BOS nor EOS, one of which lm-eval puts before texts without context")
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=found.model, tokenizer=found.tokenizer, batch_size=batch_size, device="cpu")
    with _data_folder(data), stage(f"lm-eval on {', '.join(tasks)}"):
        try:
            results = lm_eval.simple_evaluate(
                model=model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=False
            )
        except Exception as error:  # a task's data, its templates, the hub: lm-eval raises nearly any class here
            raise ValueError(f"lm-eval cannot run {', '.join(tasks)}: {type(error).__name__}: {error}") from error
    counts = results["n-samples"]
    return {
        task: {**_metrics(metrics), **({"examples": counts[task]["effective"]} if task in counts else {})}
        for task, metrics in results["results"].items()
    }


def _harness(include_path: str | None) -> tuple[Any, Any]:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"--tasks needs lm-eval, which is not installed: pip install -e .[lm-eval] ({error})") from error
    import logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = None if include_path is None else str(local(include_path))
    return lm_eval, TaskManager(include_path=folder, include_defaults=folder is None)


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """lm-eval names a metric `acc,none`: the metric and the filter."""
    return {key.removesuffix(",none"): float(value) for key, value in found.items() if isinstance(value, int | float)}


@contextmanager
def _data_folder(folder: str | None) -> Iterator[None]:
    before = os.environ.get(DATA)
    if folder is not None:
        os.environ[DATA] = str(local(folder).resolve())
    try:
        yield
    finally:
        os.environ.pop(DATA, None)
        if before is not None:
            os.environ[DATA] = before
