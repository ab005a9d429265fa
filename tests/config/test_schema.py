"""conf/schema.json is what the dataclasses say, every recipe is valid under it, and it refuses what the checks refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from qat.config import TrainConfig
from qat.config.compose.keys import config_folder
from qat.config.describe import keys
from qat.config.editing.schema import allowed_values, schema, text
from qat.config.trainer import TrainerConfig

FILE = config_folder("conf") / "schema.json"
RECIPES = sorted(config_folder("recipes").glob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(json.loads(FILE.read_text()))


def errors(recipe: Any) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(recipe)]


def test_the_file_is_current() -> None:
    assert FILE.read_text() == text(), "run: python -m qat.config.editing.schema > conf/schema.json"
    VALIDATOR.check_schema(VALIDATOR.schema)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_recipes_name_the_schema_and_are_valid(recipe: Path) -> None:
    named = re.search(r"^# yaml-language-server: \$schema=(\S+)$", recipe.read_text(), flags=re.M)
    assert named and (recipe.parent / named[1]).resolve() == FILE.resolve()
    assert errors(yaml.safe_load(recipe.read_text()) or {}) == []


def test_every_key_is_explained_with_its_default() -> None:
    for key in keys(TrainConfig):
        node = schema()
        for part in key.name.split("."):
            node = node["properties"][part]
        assert node["description"] == key.doc != "" and node["default"] == key.default


@pytest.mark.parametrize(
    "recipe",
    [
        {"quant": {"weight": "ternari"}},
        {"quant": {"act_bits": 5}},
        {"quant": {"eps": 0}},
        {"trainer": {"max_steps": 0}},
        {"trainer": {"max_steps": "many"}},
        {"trainer": {"maxsteps": 10}},
        {"trainer": {"compile": "perhaps"}},
        {"data": {"valid_fraction": 1.0}},
        {"optim": {"final_lr_fraction": 1.5}},
        {"export": {"formats": ["onnx"]}},
        {"export": {"formats": "hf"}},
        {"nothing": 1},
    ],
    ids=str,
)
def test_wrong_recipes_are_refused(recipe: dict[str, Any]) -> None:
    assert errors(recipe)


@pytest.mark.parametrize(
    "recipe",
    [
        {"quant": {"act_bits": None, "group_size": 64, "eps": 1e-6}},
        {"optim": {"lr": 1, "final_lr_fraction": 1, "optimizer": {"_target_": "x.Y", "lr": 1}}},
        {"trainer": {"max_steps": "${data.max_tokens}", "val_every": None}, "defaults": [{"override /model": "quickstart"}]},
        {"export": {"formats": ["gguf", "hf"]}, "eval": {"texts": {"a": "b.txt"}}},
    ],
    ids=str,
)
def test_right_recipes_are_not(recipe: dict[str, Any]) -> None:
    assert errors(recipe) == []


def test_allowed_values() -> None:
    assert allowed_values(TrainerConfig, "precision") == ["32-true", "bf16-mixed", "16-mixed"]
    assert allowed_values(TrainerConfig, "compile") == [True, False] and allowed_values(TrainerConfig, "max_steps") == []
