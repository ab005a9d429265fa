"""Every YAML composes, recipes are chosen by name from anywhere, and wrong input is one clear message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qat.config import (
    DataConfig,
    DistillConfig,
    OptimConfig,
    QuantConfig,
    TrainConfig,
    TrainerConfig,
)
from qat.config.compose.keys import check_keys, config_folder, options
from qat.config.compose.register import register

ROOT = Path(__file__).resolve().parents[2]


def compose(*overrides: str) -> TrainConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    register()
    with initialize_config_dir(str(config_folder("conf")), version_base="1.3"):
        composed = hydra_compose("train", ["run.name=test", "run.dir=null", *overrides])
        return OmegaConf.to_object(composed)  # type: ignore[return-value]


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qat.train", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("recipe", options()["recipe"])
def test_recipe_composes(recipe: str) -> None:
    assert isinstance(compose(f"recipe={recipe}"), TrainConfig)


@pytest.mark.parametrize("choice", [(g, n) for g, names in options().items() if g != "recipe" for n in names], ids="=".join)
def test_group_composes(choice: tuple[str, str]) -> None:
    assert isinstance(compose("=".join(choice)), TrainConfig)


def test_recipe_beats_groups_and_the_command_line_beats_the_recipe() -> None:
    config = compose("recipe=quickstart", "data.sequence_length=64", "trainer=gpu")
    assert config.data.kind == "selfgen" and config.distill.kl == 1.0
    assert config.data.sequence_length == 64
    assert config.trainer.precision == "bf16-mixed"


def test_help_is_quick_and_lists_the_recipes() -> None:
    done = command("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("quickstart", "smollm2_135m", "stories260k"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipe=typo"], ["recipe/typo", "quickstart"]),
        (["trainer.max_stepz=3"], ["trainer.max_stepz", "did you mean trainer.max_steps"]),
        (["quant=ternery"], ["quant/ternery", "ternary"]),
        (["trainer.max_steps=abc"], ["trainer.max_steps", "abc", "Integer"]),
        (["quant.weight=quaternary", "model.path=x", "data.train=y"], ["quant.weight", "quaternary", "ternary, binary"]),
        (["resume=nowhere"], ["nowhere", "config.yaml is missing"]),
        ([], ["model.path is missing"]),
    ],
)
def test_wrong_override_is_one_clear_error(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("cls", "values", "words"),
    [
        (QuantConfig, {"weight": "int4"}, "quant.weight='int4' is not allowed; choose one of ternary, binary"),
        (QuantConfig, {"weight": "binary", "scale": "absmax"}, "does not fit quant.weight=binary"),
        (QuantConfig, {"granularity": "group"}, "quant.group_size is missing"),
        (QuantConfig, {"group_size": 64}, "needs quant.granularity=group"),
        (QuantConfig, {"eps": 0.0}, "quant.eps=0.0"),
        (QuantConfig, {"act_bits": 5}, "quant.act_bits=5"),
        (DataConfig, {"kind": "selfgen", "train": "x"}, "data.train='x' does not fit data=selfgen"),
        (DataConfig, {"sequence_length": 1}, "data.sequence_length=1"),
        (DistillConfig, {"ce": 0.0}, "leave no loss"),
        (OptimConfig, {"schedule": "step"}, "optim.schedule='step'"),
        (OptimConfig, {"lr": float("nan")}, "optim.lr=nan"),
        (TrainerConfig, {"precision": "bf16-true"}, "trainer.precision=bf16-true would keep the latent weights in 16 bits"),
        (TrainerConfig, {"precision": "64-true"}, "trainer.precision='64-true'"),
        (TrainerConfig, {"max_steps": 0}, "trainer.max_steps=0"),
        (TrainerConfig, {"gradient_sums": "float16"}, "trainer.gradient_sums='float16'"),
        (TrainerConfig, {"gradient_sums": "float64", "accumulate_grad_batches": 83}, "1/83 is not 1; use 81 or 84"),
    ],
)
def test_wrong_value_names_key_value_and_what_is_allowed(cls: Any, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        cls(**values)


def test_free_keys_pass_the_key_check() -> None:
    check_keys(
        ["callbacks.mine._target_=x", "logger.wandb.offline=true", "optim.optimizer.fused=true", "hydra.verbose=true", "-m"]
    )
    with pytest.raises(ValueError, match="there is no key 'dta.train'; did you mean data"):
        check_keys(["dta.train=x"])
