"""export.checkpoint=best: the weights that a callback found best are packed, also by a run that was killed, moved or finished."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import stop_after

from qat.config import ExportConfig, TrainConfig
from qat.config.compose.saved import load_config
from qat.conversion.layers import bitlinears
from qat.reporting.page.reading import read_run
from qat.reporting.page.sections import sections
from qat.train import run

NORM = "model.norm.weight"


def best(mode: str = "max", **more: Any) -> dict[str, Any]:
    """While losses fall the highest one is the first validation's, and the lowest one the last's."""
    target = "lightning.pytorch.callbacks.ModelCheckpoint"
    return {
        "best": {
            "_target_": target,
            "monitor": "val/ce",
            "mode": mode,
            "filename": "step={step}",
            "auto_insert_metric_name": False,
            **more,
        }
    }


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    config.trainer = replace(config.trainer, max_steps=5, val_every=2, val_batches=1, samples=0, monitor_every=None)
    config.export = ExportConfig(formats=[], checkpoint="best")
    config.callbacks = best()
    return config


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "model_checkpoints").iterdir())


def norm(file: Path) -> torch.Tensor:
    return torch.load(file, weights_only=True)["state_dict"][f"student.{NORM}"]


def test_what_is_packed_is_the_best_checkpoint_and_result_and_page_say_so(config: TrainConfig, capsys: Any) -> None:
    result = run(config)
    folder, (file,) = Path(result.folder), kept(Path(result.folder))
    assert {key: result.packed_from[key] for key in ("checkpoint", "step", "of_steps", "metric")} == {
        "checkpoint": "best", "step": 2, "of_steps": 5, "metric": "val/ce",
    }  # fmt: skip
    packed = load_file(folder / "packed/model.safetensors")[NORM].float()
    assert torch.equal(packed, norm(file)) and not torch.equal(packed, norm(folder / "checkpoints/last.ckpt"))
    section = next(one for one in sections(read_run(folder)) if one.key == "result")
    words = "of step 2 of 5, where val/ce was best ("
    assert words in str(section.blocks) and words in result.weights
    about = next(one for one in sections(read_run(folder)) if one.key == "data")
    assert {"left over at the end of training, tokens", "tokens of validation"} <= {row[0].text for row in about.blocks[0].rows}  # type: ignore[union-attr]
    last = run(load_config(str(folder), ["export.checkpoint=last"]))  # of the finished run, and back again
    assert last.packed_from == {"checkpoint": "last", "step": 5, "of_steps": 5} and last.status == "done"
    assert torch.equal(load_file(folder / "packed/model.safetensors")[NORM].float(), norm(folder / "checkpoints/last.ckpt"))
    again = run(load_config(str(folder), ["export.checkpoint=best"]))
    assert (again.packed_from, again.perplexity) == (result.packed_from, result.perplexity)


@pytest.mark.parametrize(("mode", "step"), [("max", 2), ("min", 5)])
def test_a_run_that_was_killed_and_moved_packs_the_same(config: TrainConfig, tmp_path: Path, mode: str, step: int) -> None:
    config.trainer, config.callbacks = replace(config.trainer, checkpoint_every=3), best(mode)
    stop_after(config, 5)
    folder, moved = Path(str(config.run.dir)), tmp_path / "moved"
    if mode == "min":  # the last.ckpt of step 3 finds its best one there, though step 4 was better
        assert [file.name for file in kept(folder)] == ["step=2.ckpt", "step=4.ckpt"]
    folder.rename(moved)
    result = run(load_config(str(moved)))
    assert result.packed_from["step"] == step
    assert len([file for file in kept(moved) if file.name.startswith(f"step={step}")]) == 1


def test_a_run_that_died_behind_its_last_validation_knows_it(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config.callbacks = best("min")

    def dies(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("qat.training.run.finish", dies)
        with pytest.raises(RuntimeError):
            run(config)
    assert [file.name for file in kept(Path(str(config.run.dir)))] == ["step=5.ckpt"]
    assert run(load_config(str(config.run.dir))).packed_from["step"] == 5


@pytest.mark.parametrize(("change", "words"), [
    ({"callbacks": {}}, "needs one ModelCheckpoint with a monitor that keeps files, and there is none; add callbacks=best"),
    ({"callbacks": best(save_top_k=0)}, "there is none"),
    ({"callbacks": {**best(), "more": best(monitor="val/kl")["best"]}}, "there are one of val/ce, one of val/kl"),
    ({"callbacks": best(monitor="train/loss"), "val_every": None}, "needs validations to judge by; set trainer.val_every"),
    ({"val_every": None}, "there are no validations; set trainer.val_every"),
])  # fmt: skip
def test_it_is_refused_at_the_start(config: TrainConfig, change: dict[str, Any], words: str) -> None:
    config.callbacks = change.get("callbacks", config.callbacks)
    config.trainer = replace(config.trainer, val_every=change.get("val_every", config.trainer.val_every))
    with pytest.raises(ValueError, match=re.escape(words)):
        run(config)
    assert not (Path(str(config.run.dir)) / "config.yaml").exists()


def test_a_finished_run_without_a_best_checkpoint_keeps_its_result(config: TrainConfig) -> None:
    config.callbacks, config.export = {}, ExportConfig(formats=[])
    folder = Path(run(config).folder)
    before = (folder / "result.json").read_bytes()
    target = "++callbacks.best._target_=lightning.pytorch.callbacks.ModelCheckpoint"
    with pytest.raises(ValueError, match="kept no best checkpoint, and no step is left to find one"):
        run(load_config(str(folder), [target, "++callbacks.best.monitor=val/ce", "export.checkpoint=best"]))
    assert (folder / "result.json").read_bytes() == before


def test_a_best_file_that_is_gone_is_named_before_anything_is_loaded(config: TrainConfig) -> None:
    folder = Path(run(config).folder)
    (file,) = kept(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"step=2\.ckpt is the best checkpoint so far, and missing; put it back, or use last"):
        run(load_config(str(folder), ["trainer.max_steps=6"]))


class Watch(pl.Callback):
    """Keeps lambda and blend of the layers in each validation."""

    found: list[tuple[Any, Any]] = []

    def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        layers = [layer for _, layer in bitlinears(module.student)]
        self.found += [(layer.lam, layer.rms_norm.blend) for layer in layers]


def test_validations_within_a_warm_up_are_of_what_is_deployed(config: TrainConfig) -> None:
    config.optim = replace(config.optim, lambda_steps=5, rms_norm_steps=5)
    config.quant = replace(config.quant, rms_norm_eps=1e-5, rms_norm_start="blended")
    config.callbacks = {**best(), "watch": {"_target_": "test_best.Watch"}}
    Watch.found.clear()
    assert run(config).packed_from["checkpoint"] == "best"
    assert Watch.found and all(share is None or share == 1 for pair in Watch.found for share in pair)
