"""A budget becomes updates, batch, warm-up and a second beta; what limits it is said by what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qat.config import TrainConfig
from qat.reporting import plan
from qat.reporting.plan import Facts, command_line, limits, of_tokens, of_words

FACTS = Facts(parameters=260_000, state_bytes=4 * 2**20, sequence_bytes=2**20, room_bytes=2**30, text_tokens=405_000, betas=True)


@pytest.mark.parametrize(
    ("tokens", "batch", "updates"), [(1_600_000, 1, 3125), (16_000_000, 10, 3125), (100_000, 1, 195), (512, 1, 1)]
)
def test_updates_come_first(tokens: int, batch: int, updates: int) -> None:
    found = of_tokens(FACTS, 512, tokens)
    assert (found.batch, found.updates) == (batch, updates) and found.tokens <= tokens < found.tokens + 512 * batch
    assert found.warmup == round(0.05 * updates)


def test_the_half_life_is_that_of_what_was_measured() -> None:
    assert of_tokens(FACTS, 512, 1_600_000).beta2 == pytest.approx(0.999, abs=2e-5)
    assert of_tokens(FACTS, 512, 400_000).half_life == 781 * 512 // 4


def test_memory_bounds_the_batch() -> None:
    assert of_tokens(replace(FACTS, room_bytes=12 * 2**20), 512, 160_000_000).batch == 6
    assert limits(of_tokens(replace(FACTS, room_bytes=2**20), 512, 1_600_000))[0].startswith("memory: not one sequence")


@pytest.mark.parametrize(
    ("tokens", "facts", "words"),
    [
        (400_000, FACTS, ["updates: fewer than 1,000", "tokens a parameter: 1.5"]),
        (1_600_000, FACTS, ["nothing that was measured"]),
        (4_000_000, FACTS, ["the text: 9.9 passes"]),
        (4_000_000, replace(FACTS, text_tokens=None), ["nothing that was measured"]),
        (4_000_000, replace(FACTS, parameters=4_000_000), ["tokens a parameter: 1", "the text"]),
    ],
)
def test_what_limits_it(tokens: int, facts: Facts, words: list[str]) -> None:
    found = limits(of_tokens(facts, 512, tokens))
    assert len(found) == len(words) and all(line.startswith(word) for line, word in zip(found, words, strict=True))


def test_time_limits_what_nothing_else_does() -> None:
    found = of_tokens(FACTS, 512, 1_600_000, rate=1000.0, by_time=True)
    assert limits(found) == ["time"] and found.hours == pytest.approx(1600 / 3600)


def test_less_than_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="500 tokens is less than one sequence of data.sequence_length=512"):
        of_tokens(FACTS, 512, 500)


def test_words_of_the_command_line() -> None:
    assert of_words(["org/model"]) == (["model.path=org/model"], ["data=selfgen"])
    assert of_words(["recipe=quickstart"]) == (["recipe=quickstart"], [])
    assert of_words(["m", "data.train=a b.txt"]) == (["data.train=a b.txt", "model.path=m"], [])
    with pytest.raises(ValueError, match="'a' and 'b' are no settings"):
        of_words(["a", "b"])


def test_the_command_replaces_what_it_sets() -> None:
    config = TrainConfig()
    config.trainer.accumulate_grad_batches = 4
    given = ["model.path=m", "data.train=a b.txt", "trainer.max_steps=7", "trainer.accumulate_grad_batches=4"]
    assert command_line(of_tokens(FACTS, 512, 1_600_000), config, given, []) == (
        "python -m qat.train model.path=m 'data.train=a b.txt' data.batch_size=1 trainer.max_steps=3125 optim.warmup_steps=156"
        " trainer.accumulate_grad_batches=1 optim.beta2_half_life=350000"
    )
    without = of_tokens(replace(FACTS, betas=False), 512, 1_600_000)
    assert "beta2" not in command_line(without, config, given, ["data=selfgen"])
    assert "data.train=FILE" in command_line(without, config, given, ["data=selfgen"])
    assert dict(plan.rows(without))["beta2"] == "the optimizer has none"
