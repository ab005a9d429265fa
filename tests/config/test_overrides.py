"""Wrong values for every key: one line that names the key, before anything is loaded.

A seeded sample here, all of them by `make overrides`.
"""

from __future__ import annotations

import os
import random
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import pytest

from qat.config import TrainConfig
from qat.config.compose.command import parse
from qat.config.compose.composing import compose_jobs, compose_run
from qat.config.compose.text import as_typed
from qat.config.describe import Key, keys, sections

NUMBERS = ("abc", "true", "[1]", "{a: 1}", "''", "inf", "-inf", "nan", "-1", "9" * 31, "9" * 400, "9" * 5000, "[", "a b")
WRONG: dict[Any, tuple[str, ...]] = {
    int: (*NUMBERS, "1.5", "1e3", "null"),
    float: (*NUMBERS, "1e300", "1e400", "-1e-300", "null"),
    bool: ("maybe", "2", "-1", "1.0", "[true]", "{a: 1}", "''", "null"),
    str: ("", "''", "null", "\udcff"),
    list: ("x", "3", "{a: 1}", "null", "['']", "[null,\udcff]"),
    dict: ("x", "3", "[a]", "null", "true"),
}
CHOICES = ("nothing", "3", "true", "[a]", "{a: 1}")
CHOSEN = {
    "quant.weight", "quant.scale", "quant.granularity", "quant.act_granularity", "quant.scale_dtype", "quant.kernels",
    "quant.backward", "data.kind", "optim.schedule", "trainer.accelerator", "trainer.precision", "export.layout",
    "export.linear_class", "export.gguf_type", "export.gguf_floats",
}  # fmt: skip
EMPTY = {"model.path": ("", "''")}
"""Texts that may be empty when composed: a run then asks for them by name."""
SMALL = {"optim.lr": "1e-400", "data.selfgen.temperature": "1e-40", "distill.temperature": "1e-40", "quant.eps": "1e-40"}
LARGE = {"seed": "4294967296", "trainer.threads": "100000", "data.workers": "10000", "data.selfgen.batch_size": "1000000000"}


def wrong_values(key: Key) -> list[str]:
    kinds = get_args(key.type) if isinstance(key.type, UnionType) else (key.type,)
    kind = next(get_origin(one) or one for one in kinds if one is not NoneType)
    values = [value for value in WRONG[kind] if not (NoneType in kinds and value == "null")]
    values += CHOICES if key.name in CHOSEN else ()
    values += [values[key.name] for values in (SMALL, LARGE) if key.name in values]
    return [value for value in values if value not in EMPTY.get(key.name, ())]


def cases() -> list[str]:
    said = [f"{key.name}={value}" for key in keys(TrainConfig) for value in wrong_values(key) if key.name not in ("resume",)]
    nested = [*sections(TrainConfig), "data.selfgen"]
    said += [f"{name}={value}" for name in nested for value in ("null", "3", "true", "")]
    said += [f"{name}.nothing=3" for name in nested] + [f"callbacks.{tail}" for tail in ("x=3", "x={a: 1}")]
    if os.environ.get("QAT_ALL_OVERRIDES"):
        return said
    return random.Random(0).sample(said, 30)


@pytest.mark.parametrize("setting", cases(), ids=lambda setting: ascii(setting[:50]))
def test_a_wrong_override_is_one_line(setting: str) -> None:
    with pytest.raises(ValueError) as caught:
        command = parse(["model.path=x", "data.train=y", "run.dir=z", setting])
        compose_run([as_typed(one) for one in command.settings]).check()
    message = str(caught.value)
    assert setting.partition("=")[0].removeprefix("+") in message, message
    assert "\n" not in message and len(message) < 600


def test_a_mapping_of_mappings_needs_no_plus() -> None:
    patterns = "quant.overrides={*.down_proj: {components: 2}, model.layers.0: {granularity: channel}}"
    config = compose_run(["model.path=m", "quant.component_scales=learned", patterns])
    assert list(config.quant.overrides.items()) == [
        ("*.down_proj", {"components": 2}),
        ("model.layers.0", {"granularity": "channel"}),
    ]
    jobs = compose_jobs(["model.path=m", "quant.overrides={a: {components: 2}},{a: {components: 3}}"])
    assert [job.build().quant.overrides for job in jobs] == [{"a": {"components": k}} for k in (2, 3)]
    with pytest.raises(ValueError, match=r"quant.overrides, a: quant.components=7 is not allowed"):
        compose_run(["model.path=m", "quant.overrides={a: {components: 7}}"])
