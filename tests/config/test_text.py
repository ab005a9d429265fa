"""Text reaches the configuration as it was typed, and what Hydra means by quotes, null, functions and commas stays."""

from __future__ import annotations

import pytest

from qat.config import TrainConfig
from qat.config.compose.composing import compose_run
from qat.config.compose.text import as_typed, split


def composed(*settings: str) -> TrainConfig:
    return compose_run([as_typed(setting) for setting in ("run.dir=null", *settings)])


TYPED = (
    "my dir/[x]=1#2", "数据/模型.txt", "12345e7", "0123", "1_000", "007", "2024-01-01", "on", "off", "True", "None", "~", "1.50",
    "a,b", "it's", "a'b\"c", "x(y", "{a", "C:\\dir\\", "a: b", "!x", "&x", "*", "|", " a ", "\\", "inf", "0x10", "-0", "é" * 50,
)  # fmt: skip


def test_text_arrives_as_typed() -> None:
    keys = ("model.revision", "data.subset", "data.train", "model.teacher")
    for start in range(0, len(TYPED), len(keys)):
        texts = TYPED[start : start + len(keys)]
        config = composed(*(f"{key}={text}" for key, text in zip(keys, texts, strict=False)))
        got = (config.model.revision, config.data.subset, config.data.train, config.model.teacher)
        assert got[: len(texts)] == texts


def test_what_is_hydras_stays_hydras() -> None:
    config = composed("model.path='a b'", "data.subset=null", 'data.train="x,y"', "data.valid=a\\ b", "run.dir=runs/${run.name}")
    assert (config.model.path, config.data.subset, config.data.train, config.data.valid) == ("a b", None, "x,y", "a b")
    assert config.run.dir == "runs/custom"


def test_lists_and_mappings_of_text() -> None:
    config = composed("model.exclude=[layers.[01].q, 007,*.lm_head]", "model.include=[]", "eval.texts={a: my file.txt,b: 0123}")
    assert config.model.exclude == ["layers.[01].q", "007", "*.lm_head"] and config.model.include == []
    assert config.eval.texts == {"a": "my file.txt", "b": "0123"}
    assert composed("eval.texts.new=x [1].txt").eval.texts == {"new": "x [1].txt"}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("quant.weight=ternary,binary", "quant.weight='ternary','binary'"),
        ("run.name=007,1_0", "run.name='007','1_0'"),
        ("model.path='a,b',c", "model.path='a,b','c'"),
        ("model.path=choice(a,b)", "model.path=choice(a,b)"),
        ("model.exclude=[a,b],[c]", "model.exclude=['a','b'],['c']"),
        ("trainer.max_steps=1,2", "trainer.max_steps=1,2"),
        ("quant=ternary,binary", "quant=ternary,binary"),
        ("+callbacks.x._target_=a.b", "+callbacks.x._target_=a.b"),
    ],
)
def test_commas_part_values_in_a_sweep_alone(setting: str, expected: str) -> None:
    assert as_typed(setting, sweep=True) == expected


def test_brackets_that_do_not_pair_up_are_letters() -> None:
    assert split("a[1,2],b") == ["a[1,2]", "b"] and split("a[1,b") == ["a[1", "b"] and split("'a,b',c") == ["'a,b'", "c"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.path=null", "for the word: model.path=\"'null'\""),
        ("trainer.max_steps=null", "a value is needed"),
        ("model.exclude=lm_head", r"must be a list: model.exclude=\[lm_head\]"),
        ("model.path=a\udcff", "must be UTF-8"),
        ("trainer.compile=2", "choose one of true, false"),
        ("trainer=null", "choose one of trainer=cpu, trainer=gpu"),
        ("~recipe", "choose one of recipe=custom"),
        ("optim.lr=" + "9" * 400, "no number has so many digits"),
    ],
)
def test_what_cannot_be_is_said(setting: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        as_typed(setting)
