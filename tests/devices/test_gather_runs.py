"""Whole runs whose weights travel as codes: those of every other way to use two devices, and of one process, to the bit."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from devices.pair import Pair
from several import alone, assert_equal, both, stopped, tiny

from qat.config import DistillConfig, OptimConfig, QuantConfig, TrainConfig, TrainerConfig
from qat.conversion.layers import bitlinears
from qat.ops.shards.gathered import GatheredCodes
from qat.training.run import run
from qat.training.strategies import placing

GATHERS = ("float32", "codes")
LAYERS = 14
ALONE = DistillConfig(ce=1.0, kl=0.0)
"""One term, of which no gradient is measured on the side."""


def state(folder: Path) -> tuple[Any, Any]:
    """Weights and moments."""
    found = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    return found["state_dict"], found["optimizer_states"][0]["state"]


def assert_same(one: Path, other: Path) -> None:
    """Weights, moments and texts; what looks say of layers is compared where each strategy is."""
    assert_equal(dict(enumerate(state(one))), dict(enumerate(state(other))))
    for file in ("samples.md", "samples.json"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


@pytest.fixture
def config(still: Path, text_file: Path, tmp_path: Path) -> TrainConfig:
    return tiny(still, text_file, tmp_path / "run", strategy="fsdp2", gather="codes")


def by(config: TrainConfig, **trainer: Any) -> TrainConfig:
    """The same in another way and folder."""
    folder = f"{config.run.dir}-{'-'.join(str(value) for value in trainer.values())}"
    return replace(config, trainer=replace(config.trainer, **trainer), run=replace(config.run, dir=folder))


def one_process(config: TrainConfig) -> Path:
    return alone(by(config, strategy="auto", gather="auto"))


def test_every_way_to_use_two_devices_is_one_process(pair: Pair, config: TrainConfig) -> None:
    """20 steps, with a teacher and clipping."""
    one = one_process(config)
    for trainer in ({"strategy": "ddp", "gather": "auto"}, *({"gather": gather} for gather in GATHERS)):
        assert_same(one, both(pair, by(config, **trainer)))


GROUPS = {"granularity": "group", "group_size": 8, "overrides": {"*.down_proj": {"granularity": "channel", "group_size": None}}}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "bf16-mixed": ({"precision": "bf16-mixed"}, {}, {}),
    "checkpointed, channel": ({"activation_checkpointing": True}, {"granularity": "channel"}, {}),
    "group, soft codes": ({}, GROUPS, {"anneal": "soft", "anneal_share": 0.5, "anneal_rest_lr": 0.0}),
    "components, blended": ({}, {"granularity": "channel", "components": 2}, {"lambda_steps": 5, "lambda_schedule": "layerwise"}),
}
"""Of `trainer`, `quant` and `optim`."""


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_in_other_settings(pair: Pair, config: TrainConfig, name: str) -> None:
    trainer, quant, optim = SETTINGS[name]
    config = by(config, max_steps=8, **trainer)
    config = replace(config, quant=QuantConfig(**quant), optim=OptimConfig(lr=5e-3, warmup_steps=2, **optim))
    assert_same(one_process(config), both(pair, config))


def ways(config: TrainConfig) -> list[int]:
    """Layers that had codes in each step of a run."""
    seen: list[bool] = []
    original = placing.sharded

    def sharded(model: Any, mesh: Any, ready: Any = None) -> Any:
        shell = original(model, mesh, ready)
        for _, layer in bitlinears(shell):
            layer.register_forward_pre_hook(
                lambda layer, _: seen.append(isinstance(layer.weight.data, GatheredCodes)) if layer.training else None
            )
        return shell

    placing.sharded = sharded  # type: ignore[assignment]
    try:
        run(config)
    finally:
        placing.sharded = original
    return [sum(seen[i : i + LAYERS]) for i in range(0, len(seen), LAYERS)]


@pytest.mark.parametrize(("optim", "coded"), [
    ({"lambda_steps": 3}, [0, 0, 0, 14, 14, 14]),
    ({"lambda_steps": 4, "lambda_schedule": "layerwise"}, [0, 0, 7, 7, 14, 14]),
    ({"anneal": "soft", "anneal_share": 0.5}, [0, 0, 0, 14, 14, 14]),
])  # fmt: skip
def test_a_phase_that_needs_floats_has_them_and_no_other(
    pair: Pair, config: TrainConfig, optim: dict[str, Any], coded: list[int]
) -> None:
    quiet = replace(config.trainer, max_steps=6, val_every=2, samples=0, monitor_every=None, devices=2)
    config = replace(config, trainer=quiet, optim=OptimConfig(lr=5e-3, **optim), distill=ALONE)
    for found in pair(ways, config, seconds=200):
        assert found == coded


@pytest.mark.parametrize("optim", [{}, {"lambda_steps": 5}], ids=["codes", "blended"])
def test_resume_with_codes_then_floats_then_one_process(pair: Pair, config: TrainConfig, optim: dict[str, Any]) -> None:
    """At odd steps, one of them in the middle of a blend."""
    config = replace(config, optim=OptimConfig(lr=5e-3, warmup_steps=2, **optim))
    config = replace(config, trainer=replace(config.trainer, max_steps=10, devices=2, val_every=None, monitor_every=None))
    whole, folder = one_process(config), str(config.run.dir)
    pair(stopped, config, 3, seconds=200)
    resumed = replace(config, resume=folder)
    pair(stopped, replace(resumed, trainer=replace(config.trainer, gather="float32")), 7, seconds=200)
    last = replace(config.trainer, strategy="auto", gather="auto", devices=1, accumulate_grad_batches=2)
    run(replace(resumed, trainer=last))
    assert_equal(dict(enumerate(state(whole))), dict(enumerate(state(Path(folder)))))


def test_what_is_written_is_what_one_process_writes(pair: Pair, config: TrainConfig) -> None:
    """Checkpoint, packed and exported weights, texts, measures: the latter on the packed model, too."""
    config.trainer = replace(config.trainer, max_steps=4, val_every=2)
    config.export = replace(config.export, formats=["hf"])
    one, two = one_process(config), both(pair, config)
    assert_same(one, two)
    assert {(type(value), value.dtype) for value in state(two)[0].values()} == {(torch.Tensor, torch.float32)}
    for file in ("packed/model.safetensors", "model/model.safetensors"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (one, two))
    assert ours["perplexity"] == theirs["perplexity"]
    assert theirs["verification"]["packed_max_logit_difference"] == 0.0


def printed(config: TrainConfig) -> list[str]:
    """Lines of a run that are about what travels."""
    with redirect_stdout(io.StringIO()) as text:
        run(config)
    return [line for line in text.getvalue().splitlines() if "gathered" in line]


def test_layers_that_cannot_send_codes_are_named_once(pair: Pair, config: TrainConfig) -> None:
    short = replace(config.trainer, max_steps=2, val_every=None, devices=2)
    config = replace(config, trainer=short, quant=QuantConfig(overrides={"*.down_proj": {"scale": "absmax"}}))
    why = "it has one scale, and absmax is no sum over its parts"
    line = f"weights that are gathered in float32, not as codes: 2 of 14 layers: {why}"
    assert pair(printed, config, seconds=200) == [[line], []]
    assert pair(printed, by(config, gather="float32"), seconds=200) == [[], []]
    lsq = by(config, gather="auto")
    lsq = replace(lsq, quant=QuantConfig(weight="lsq"))
    assert [len(lines) for lines in pair(printed, lsq, seconds=200)] == [1, 0]


def test_codes_that_no_layer_can_send_are_refused(pair: Pair, config: TrainConfig) -> None:
    config = replace(config, trainer=replace(config.trainer, devices=2), quant=QuantConfig(weight="lsq"))
    why = "step and unit of its quantizer change beside the weight"
    said = f"weights that are gathered in float32, not as codes: 14 of 14 layers: {why}"
    wanted = f"ValueError: trainer.gather=codes, but {said}; use trainer.gather=auto"
    assert pair.failures(run, config, seconds=120) == [wanted] * 2
    assert not Path(str(config.run.dir)).exists()


@pytest.mark.parametrize(("keys", "said"), [
    ({"strategy": "ddp", "gather": "codes"}, "trainer.gather=codes needs trainer.strategy=fsdp2, not ddp"),
    ({"gather": "float32"}, "trainer.gather=float32 needs trainer.strategy=fsdp2, not auto"),
    ({"strategy": "fsdp2", "gather": "bfloat16"}, "trainer.gather='bfloat16' is not allowed"),
])  # fmt: skip
def test_what_gathers_nothing_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        TrainerConfig(**keys)
