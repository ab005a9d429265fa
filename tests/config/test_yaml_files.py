"""Files that may come from others are read in bounded time, and their errors name the file."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qat.config.compose.register import register
from qat.config.compose.saved import read_saved
from qat.config.compose.yaml_files import MOST_NODES, read_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
HOSTILE = {
    "laughs": (LAUGHS, "aliases counted as what they stand for"),
    "deep flow": ("a: " + "[" * 100_000, "nested deeper than 32"),
    "deep block": ("".join("  " * i + "a:\n" for i in range(300)), "nested deeper than 32"),
    "deep by aliases": ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 60)), "nested deeper than 32"),
    "itself": ("a: &a [*a]", r"the alias \*a stands for nothing"),
    "many": ("a: [" + "x," * (MOST_NODES + 1) + "]", "more than"),
    "big": ("a: " + "x" * 300_000, "more than 262144 bytes"),
    "list": ("[1, 2]", "not a list"),
    "cut off": ("a: [1", "damaged"),
    "tag": ("a: !!python/object/apply:os.system ['true']", "damaged"),
    "double key": ("a: 1\na: 2", "duplicate key"),
    "not utf-8": ("a: \udcff", "utf-8"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_error_soon(name: str, tmp_path: Path) -> None:
    text, words = HOSTILE[name]
    file = tmp_path / "x.yaml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=words) as caught:
        read_yaml(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert time.perf_counter() - start < 5


def test_aliases_and_empty_files_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("a: &a {lr: 1e-3}\nb: *a\n")
    assert read_yaml(file) == {"a": {"lr": 0.001}, "b": {"lr": 0.001}}
    file.write_text("# nothing\n")
    assert read_yaml(file) == {}


def test_a_damaged_recipe_stops_only_who_chooses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.yaml").write_text("seed: 3\n")
    (tmp_path / "bad.yaml").write_text("a: [1")
    from qat.config.compose import register as module

    real = module.config_folder
    monkeypatch.setattr(module, "config_folder", lambda name: tmp_path if name == "recipes" else real(name))
    register(["recipe=good"])
    with pytest.raises(ValueError, match=r"bad.yaml is damaged"):
        register(["recipe=good,bad"])


def test_a_recipe_of_ones_own_folder_says_that_it_is_global(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    file = tmp_path / "recipe" / "mine.yaml"
    file.write_text("seed: 3\n")
    with pytest.raises(ValueError, match=r"mine.yaml: a recipe's first line must be '# @package _global_'"):
        register(["recipe=mine"], str(tmp_path))
    with pytest.raises(ValueError, match="no such folder"):
        register([], str(tmp_path / "none"))
    file.write_text("# @package _global_\nseed: 3\n")
    from qat.config.compose.composing import compose_run

    assert compose_run(["recipe=mine"], str(tmp_path)).seed == 3
    for wrong, key in (("model: {pth: x}", "model.pth"), ("trainer: {max_steps: many}", "trainer.max_steps")):
        file.write_text(f"# @package _global_\n{wrong}\n")
        with pytest.raises(ValueError, match=rf"In 'recipe/mine'.*\(key {key}\)"):
            compose_run(["recipe=mine"], str(tmp_path))


def test_a_saved_configuration_resolves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: '${oc.env:HOME}'}\n")
    with pytest.raises(ValueError, match="has values only"):
        read_saved(str(tmp_path))
