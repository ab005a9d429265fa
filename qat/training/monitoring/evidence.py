"""What a run keeps for its report beside numbers: texts of each of its stages, and its latent weights before and after training.

Both are small files in the run's folder, written anew as a stage is reached, so that an interrupted run has what it came to.
Continuations are greedy and draw no random numbers, so a run that keeps them is the same run to the bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from qat.config import TrainConfig
from qat.data import QATData
from qat.models.hub import context_length
from qat.monitor.histograms import latent_histograms
from qat.reporting.page.reading import LATENTS, SAMPLES
from qat.storage import parse_json, write_text
from qat.tasks import TASKS
from qat.training.callbacks import Samples
from qat.training.tasks import Measure
from qat.training.trainings import prompts

NEW_TOKENS = 48
SIDES = {"converted": "before", "trained": "after"}
"""Stage -> what its histograms are called."""


def keep(
    config: TrainConfig, data: QATData, tokenizer: Any, measure: Measure, stage: str, model: nn.Module, folder: Path
) -> None:
    """What there is to keep of a model at a stage; it is left in eval mode on the CPU, as measuring leaves it."""
    if config.trainer.samples and TASKS[config.task].generates and _writes(model):
        _keep_texts(config, data, tokenizer, measure, stage, model, folder / SAMPLES)
    if stage in SIDES and config.trainer.monitor_every is not None:
        _keep_latents(SIDES[stage], model, folder / LATENTS)


def _writes(model: Any) -> bool:
    """Whether transformers can generate with it; a model of one's own code need not."""
    return bool(getattr(model, "can_generate", bool)())


def _keep_texts(config: TrainConfig, data: QATData, tokenizer: Any, measure: Measure, stage: str, model: Any, file: Path) -> None:
    given = prompts(config, data)
    room = (context_length(model) or 2**31) - given.shape[1]
    if room < 1 or not len(given):
        return
    samples = Samples(given, tokenizer, file, min(NEW_TOKENS, room))
    placed = measure.place(model)
    texts = samples.generate(placed, next(placed.parameters()).device)
    model.cpu()
    found = _read(file)
    stages = {**(found.get("stages") or {}), stage: texts}
    shown = tokenizer.batch_decode(given, skip_special_tokens=True)
    write_text(file, json.dumps({"prompts": shown, "stages": stages}, indent=1))


def _keep_latents(side: str, model: nn.Module, file: Path) -> None:
    families: dict[str, Any] = _read(file).get("families") or {}
    for name, one in latent_histograms(model).items():
        kept = families.setdefault(name, {})
        kept |= {"centers": one.centers, "thresholds": one.borders, side: one.shares}
    write_text(file, json.dumps({"families": families}))


def _read(file: Path) -> dict[str, Any]:
    """What earlier stages kept; nothing where the file is damaged, as it is written anew."""
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
