"""What may change when a run goes on, how it is recorded, and what a folder alone may not make us run."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qat.config import ModelConfig, QuantConfig, RunConfig, TrainConfig
from qat.config.compose.resume import ALLOWED, HISTORY, REFUSED, record, resumed
from qat.config.compose.saved import load_config, save_config
from qat.config.compose.targets import KNOWN
from qat.config.describe import keys

MINE = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/ce"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = TrainConfig(
        model=ModelConfig(path="0123"), quant=QuantConfig(weight="binary"), seed=5, callbacks={"mine": dict(MINE)}
    )
    config.resume, config.dry_run, config.trust_targets = "x", True, True
    save_config(config, tmp_path)
    return tmp_path


def test_the_saved_configuration_comes_back(folder: Path) -> None:
    config, changes = resumed(str(folder), [])
    assert changes == {} and config.resume == str(folder) and not config.dry_run and not config.trust_targets
    assert (config.model.path, config.quant.weight, config.seed, config.callbacks) == ("0123", "binary", 5, {"mine": MINE})


def test_overrides_have_hydras_full_grammar(folder: Path) -> None:
    said = [
        "trainer.max_steps=7",
        "optim.lr=0.5",
        "export.formats=[gguf,hf]",
        "++eval.texts={a: 'b c'}",
        "~callbacks.mine",
        "+callbacks.two={_target_: my.Callback, options: {a: [1, 2]}}",
        "data.cache_dir=null",
    ]
    config, changes = resumed(str(folder), said)
    assert config.callbacks == {"two": {"_target_": "my.Callback", "options": {"a": [1, 2]}}}
    assert config.export.formats == ["gguf", "hf"] and config.eval.texts == {"a": "b c"} and config.optim.lr == 0.5
    assert changes["trainer.max_steps"] == (1000, 7) and changes["callbacks.mine.monitor"] == ("val/ce", None)
    assert changes["export.formats"] == (["hf"], ["gguf", "hf"]) and "data.cache_dir" not in changes


REASONS = {
    "model.path=other": "weights are of that model",
    "model.exclude=[a]": "weights are of that model",
    "quant.weight=ternary": "trained with that quantizer",
    "quant.scale_dtype=float16": "trained with that quantizer",
    "data.train=other.txt": "the place in the data",
    "data.sequence_length=64": "the place in the data",
    "data.selfgen.tokens=7": "the place in the data",
    "seed=6": "random numbers of that seed",
    "run.dir=elsewhere": "stays in its folder",
    "optim.optimizer._target_=torch.optim.SGD": "state of that optimizer",
}


@pytest.mark.parametrize("override", REASONS)
def test_what_cannot_apply_is_refused_with_its_reason(folder: Path, override: str) -> None:
    with pytest.raises(ValueError, match=REASONS[override]) as caught:
        resumed(str(folder), [override])
    assert override.partition("=")[0] in str(caught.value) and "\n" not in str(caught.value)


def test_saying_again_what_is_so_is_no_change(folder: Path) -> None:
    assert resumed(str(folder), ["quant.weight=binary", "seed=5"])[1] == {}


def test_every_exception_lies_below_a_refused_key_that_exists() -> None:
    names = {key.name for key in keys(TrainConfig)}
    assert names >= ALLOWED.keys() and all(key.partition(".")[0] in REFUSED for key in ALLOWED)
    assert all(key in names or any(name.startswith(f"{key}.") for name in names) for key in REFUSED)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer=gpu", "set its keys instead: trainer.accelerator=gpu trainer.precision=bf16-mixed"),
        ("quant=ternary", "for example quant.KEY=value"),
        ("logger=tensorboard", r"instead: \+\+logger.tensorboard._target_=lightning.pytorch.loggers.TensorBoardLogger"),
        ("recipe=quickstart", "set single keys instead"),
        ("optim=nothing", "set single keys instead"),
    ],
)
def test_a_group_is_chosen_at_the_start(folder: Path, override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resumed(str(folder), [override])


def test_the_advised_keys_of_a_group_apply(folder: Path) -> None:
    for group in ("logger=wandb", "logger=tensorboard", "trainer=gpu"):
        with pytest.raises(ValueError, match="set its keys instead") as caught:
            resumed(str(folder), [group])
        resumed(str(folder), shlex.split(str(caught.value).partition("instead: ")[2]))


def test_a_home_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resumed(f"~/{folder.name}", [])[0].resume == str(folder)
    assert (
        RunConfig(dir="~/a run").dir == f"{folder.parent}/a run"
        and RunConfig(dir="~nobody-has-this/x").dir == "~nobody-has-this/x"
    )
    assert TrainConfig(resume="~/r").resume == f"{folder.parent}/r"


def test_what_applies_is_recorded_and_what_was_is_kept(folder: Path) -> None:
    config, changes = resumed(str(folder), ["optim.lr=0.5", "quant.backward=bf16"])
    assert record(config, step=4) == changes == {"optim.lr": (1e-3, 0.5), "quant.backward": ("input", "bf16")}
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr"] == 0.5
    (line,) = (folder / HISTORY).read_text().splitlines()
    assert json.loads(line)["step"] == 4 and json.loads(line)["changes"]["optim.lr"] == [1e-3, 0.5]
    again, changes = resumed(str(folder), ["optim.lr=0.25"])
    assert record(again, step=6)["optim.lr"] == (0.5, 0.25)
    assert record(again, step=8) == {} and len((folder / HISTORY).read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="quant.weight=ternary cannot apply"):
        record(replace(again, quant=QuantConfig()), step=8)


def hostile(folder: Path, **values: Any) -> str:
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    for key, value in values.items():
        section, _, name = key.partition("__")
        saved[section][name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    return str(folder)


RUN = {"_target_": "os.system", "command": "touch ran"}
HOSTILE = {
    "callback": {"callbacks__mine": RUN},
    "logger": {"logger__mine": RUN},
    "optimizer": {"optim__optimizer": RUN},
    "nested": {"callbacks__mine": {**MINE, "monitor": RUN}},
    "nested in a list": {"callbacks__mine": {**MINE, "monitor": [{"a": [RUN]}]}},
    "args": {"callbacks__mine": {**MINE, "_args_": [RUN]}},
    "partial": {"callbacks__mine": {**MINE, "_partial_": True}},
    "attribute of a module": {"optim__optimizer": {"_target_": "torch.optim.optimizer.os.system"}},
    "function of a known module": {"callbacks__mine": {"_target_": "lightning.pytorch.callbacks.callback"}},
    "hydra's own": {"callbacks__mine": {"_target_": "hydra.utils.instantiate", "config": RUN}},
    "method": {"callbacks__mine": {"_target_": "lightning.pytorch.callbacks.Callback.__init__"}},
    "none": {"callbacks__mine": {"monitor": RUN}},
    "no mapping": {"callbacks__mine": "os.system"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_folder_runs_no_code(name: str, folder: Path) -> None:
    where = hostile(folder, **HOSTILE[name])
    with pytest.raises(ValueError, match=r"trust_targets=true, or say .*_target_") as caught:
        load_config(where)
    assert "\n" not in str(caught.value)
    assert load_config(where, ["trust_targets=true"]).trust_targets


def test_trust_is_said_on_the_command_line_only(folder: Path) -> None:
    file = folder / "config.yaml"
    file.write_text(file.read_text() + "trust_targets: true\n")
    with pytest.raises(ValueError, match=r"trust_targets=true"):
        load_config(hostile(folder, callbacks__mine=RUN))


def test_what_the_command_line_says_itself_is_free(folder: Path) -> None:
    where = hostile(folder, callbacks__mine=RUN)
    config = load_config(where, ["callbacks.mine._target_=my.Callback"])
    assert config.callbacks["mine"]["_target_"] == "my.Callback"
    with pytest.raises(ValueError, match="trust_targets"):
        load_config(where, ["callbacks.mine.command=x"])


def test_a_models_own_code_is_asked_for_again(folder: Path) -> None:
    where = hostile(folder, model__trust_remote_code=True)
    with pytest.raises(ValueError, match="model.trust_remote_code=true"):
        load_config(where)
    assert load_config(where, ["model.trust_remote_code=true"]).model.trust_remote_code


def test_the_known_modules_exist_and_hold_what_the_groups_name() -> None:
    import importlib

    assert all(importlib.import_module(module) for module in KNOWN)
    for name in ("tensorboard", "wandb"):
        text = (Path(__file__).resolve().parents[2] / f"conf/logger/{name}.yaml").read_text()
        assert any(f"_target_: {module}." in text for module in KNOWN)


def test_attention_may_be_computed_in_another_way_from_there_on(folder: Path) -> None:
    config, changes = resumed(str(folder), ["model.attn_implementation=eager"])
    assert config.model.attn_implementation == "eager" and set(changes) == {"model.attn_implementation"}


def test_how_weights_travel_goes_with_the_strategy(folder: Path) -> None:
    """A run whose devices gathered codes goes on without any, and with another way to gather where that is asked for."""
    config = load_config(str(folder))
    save_config(replace(config, trainer=replace(config.trainer, devices=2, strategy="fsdp2", gather="codes")), folder)
    trainer = resumed(str(folder), ["trainer.strategy=auto", "trainer.devices=1"])[0].trainer
    assert (trainer.strategy, trainer.gather) == ("auto", "auto")
    assert resumed(str(folder), [])[0].trainer.gather == "codes"
    with pytest.raises(ValueError, match="trainer.gather=float32 needs trainer.strategy=fsdp2, not ddp"):
        resumed(str(folder), ["trainer.strategy=ddp", "trainer.gather=float32"])
