"""Runs are described by their updates, and those with few of them are told how to make more."""

from __future__ import annotations

import pytest

from qat.config import TrainConfig
from qat.reporting import updates


def of(steps: int, batch: int, accumulate: int = 1, length: int = 512) -> TrainConfig:
    config = TrainConfig()
    config.trainer.max_steps, config.trainer.accumulate_grad_batches = steps, accumulate
    config.data.batch_size, config.data.sequence_length = batch, length
    return config


@pytest.mark.parametrize(
    ("steps", "batch", "accumulate", "words"),
    [
        (3120, 1, 1, "3,120 updates of 512 tokens, 1.6 million tokens"),
        (390, 2, 4, "390 updates of 4,096 tokens, 1.6 million tokens"),
        (3, 1, 1, "3 updates of 512 tokens, 1,536 tokens"),
        (250_000, 16, 1, "250,000 updates of 8,192 tokens, 2.0 billion tokens"),
    ],
)
def test_in_words(steps: int, batch: int, accumulate: int, words: str) -> None:
    assert updates.in_words(of(steps, batch, accumulate)) == words


def test_a_thousand_are_not_warned_of() -> None:
    assert updates.warning(of(1000, 8)) is None
    said = updates.warning(of(999, 8))
    assert said is not None and said.startswith("999 updates; below 1,000 the gap to full precision is limited by updates")


def test_the_warning_names_keys_that_make_more_of_the_same_tokens() -> None:
    said = updates.warning(of(390, 8))
    assert said is not None and said.endswith(": data.batch_size=1 trainer.max_steps=3120 makes 3,120 of the same tokens")
    said = updates.warning(of(500, 8, accumulate=4))
    keys = "data.batch_size=5 trainer.max_steps=3200 trainer.accumulate_grad_batches=1"
    assert said is not None and f"{keys} makes 3,200 of the same tokens" in said
    said = updates.warning(of(40, 8))
    assert said is not None and said.endswith("makes 320 of the same tokens, and more tokens make more")


def test_each_device_has_a_batch_of_its_own() -> None:
    config = of(8, 1)
    config.trainer.devices = 2
    assert "as many as these tokens allow" in str(updates.warning(config))
    config.data.batch_size, config.trainer.num_nodes = 4, 3  # 192 sequences, six at a time
    assert "data.batch_size=1 trainer.max_steps=32 makes 32 of the same tokens" in str(updates.warning(config))


def test_at_a_batch_of_one_it_asks_for_more_tokens() -> None:
    said = updates.warning(of(300, 1))
    assert said is not None and "as many as these tokens allow; trainer.max_steps=1000 or more" in said


@pytest.mark.parametrize(("warmup", "share", "said"), [(99, 0.0, False), (100, 0.0, True), (0, 0.05, False), (200, 0.0, True)])
def test_a_warm_up_that_outlasts_the_run_is_said(warmup: int, share: float, said: bool) -> None:
    config = of(100, 1)
    config.optim.warmup_steps, config.optim.warmup_share = warmup, share
    words = f"warning: a warm-up of {warmup} of 100 updates: the rate never falls; optim.warmup_steps=5 fits"
    assert (words in updates.lines(config)) is said


def test_beta2_keeps_its_half_life() -> None:
    assert updates.beta2(4096, 55_352) == pytest.approx(0.95, abs=1e-4)
    assert updates.beta2(512, 55_352) == pytest.approx(0.9936, abs=1e-4)
    assert updates.beta2(512, 55_352) ** 8 == pytest.approx(updates.beta2(4096, 55_352))


@pytest.mark.parametrize(
    ("strategy", "how"),
    [
        ("auto", "4 batches' on each of 16 devices, then over devices"),
        ("ddp", "4 batches' on each of 16 devices, then over devices"),
        ("fsdp2", "those of a batch over 16 devices, then 4 batches'"),
    ],
)
def test_the_order_of_sums_is_said_where_it_is_not_one_devices(strategy: str, how: str) -> None:
    config = of(3120, 1, 4)
    config.trainer.strategy, config.trainer.devices, config.trainer.num_nodes = strategy, 8, 2
    turn = "in turn: equal up to rounding, not to the bit, but with trainer.gradient_sums=float64"
    assert updates.lines(config) == [updates.in_words(config), f"gradients are added {how}; one process adds 64 {turn}"]
    config.trainer.accumulate_grad_batches = 1
    said = f"gradients are added over 16 devices; one process adds 16 {turn}"
    assert updates.lines(config) == [updates.in_words(config), said]
    config.trainer.gradient_sums = "float64"
    assert updates.lines(config) == [updates.in_words(config)]


@pytest.mark.parametrize("devices,batches", [(1, 4), (2, 1)])
def test_nothing_is_said_where_no_order_matters(devices: int, batches: int) -> None:
    config = of(3120, 1, batches)
    config.trainer.devices = devices
    assert updates.lines(config) == [updates.in_words(config)]
