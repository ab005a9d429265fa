"""Which step's weights are packed: the last one's, or those of the checkpoint that a callback found best.

Any ModelCheckpoint with a monitor may say what is best; with several of them it would be a guess. Validations are of the model as
it would be deployed, also within a warm-up (`qat.training.callbacks.warmup`), so that their values compare from the first on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from qat.config import TrainConfig
from qat.training.checkpoints import newest, read_step

BEST = "best"
_STUDENT = "student."


@dataclass(frozen=True)
class Chosen:
    """The weights that are packed: of optimizer `step`, of `of_steps` that were trained."""

    checkpoint: str
    step: int
    of_steps: int
    metric: str | None = None
    value: float | None = None

    def facts(self) -> dict[str, Any]:
        """For result.json, without what does not apply."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def judge(config: TrainConfig, callbacks: list[Callback]) -> ModelCheckpoint | None:
    """The callback that says which checkpoint is best; None where the last one is packed.

    Raises:
        ValueError: there is none, it keeps nothing, or there are several.
    """
    if config.export.checkpoint != BEST:
        return None
    able = [one for one in callbacks if isinstance(one, ModelCheckpoint) and one.monitor and one.save_top_k]
    if len(able) == 1:
        return able[0]
    found = "there is none" if not able else "there are " + ", ".join(f"one of {one.monitor}" for one in able)
    raise ValueError(
        f"export.checkpoint=best needs one ModelCheckpoint with a monitor that keeps files, and {found};"
        " add callbacks=best and trainer.val_every=N"
    )


def check_best(config: TrainConfig, callbacks: list[Callback]) -> None:
    """Refuse export.checkpoint=best where no checkpoint can be the best one, before anything is loaded.

    Raises:
        ValueError: as in `judge`, there are no validations, or the run to resume has lost its best file, or never kept one.
    """
    callback = judge(config, callbacks)
    if callback is None:
        return
    by_steps = callback._every_n_train_steps and not str(callback.monitor).startswith("val/")
    if config.trainer.val_every is None and not by_steps:
        raise ValueError("export.checkpoint=best needs validations to judge by; set trainer.val_every")
    if config.resume:
        _check_kept(config, callback)


def _check_kept(config: TrainConfig, callback: ModelCheckpoint) -> None:
    """The checkpoint that a run goes on from knows a best one that is there, or steps are left to find one."""
    folder = Path(str(config.resume))
    if (found := newest(folder / "checkpoints")) is None:
        return
    states = torch.load(found.file, map_location="cpu", weights_only=True, mmap=True).get("callbacks", {})
    state = moved(states.get(callback.state_key, {}), str(callback.dirpath or home(folder)))
    best = state.get("best_model_path")
    if not best and found.step >= config.trainer.max_steps:
        raise ValueError(f"export.checkpoint=best: {folder} kept no best checkpoint, and no step is left to find one")
    if best and not Path(best).is_file():
        raise ValueError(f"export.checkpoint=best: {best} is the best checkpoint so far, and missing; put it back, or use last")


def home(folder: Path) -> Path:
    """Where the ModelCheckpoints of a run write: checkpoints/ holds those that a resume is exact from."""
    return folder.resolve() / "model_checkpoints"


def moved(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """A ModelCheckpoint's state whose files lie in `folder` now: of a run that was moved, or is named by another path.

    lightning itself would forget all scores, so that the next validation were the best whatever it gives.
    """
    old = state.get("dirpath")
    if not old or old == folder:
        return state

    def there(path: str) -> str:
        return str(Path(folder) / Path(path).relative_to(old)) if path and Path(path).is_relative_to(old) else path

    paths: dict[str, Any] = {
        key: there(state[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path") if key in state
    }
    if not any(path and Path(path).is_file() for path in paths.values()):
        return state
    return {**state, **paths, "dirpath": folder, "best_k_models": {there(path): v for path, v in state["best_k_models"].items()}}


def chosen(config: TrainConfig, callbacks: list[Callback], student: nn.Module, last: int) -> Chosen:
    """Put the weights that are to be packed into the student, which has those of step `last`.

    Raises:
        ValueError: no checkpoint was found best, or its file is damaged.
    """
    callback = judge(config, callbacks)
    if callback is None:
        return Chosen("last", last, last)
    if not callback.best_model_path:
        raise ValueError(
            f"export.checkpoint=best: no checkpoint was kept by {callback.monitor}; the run can be finished with"
            f" resume={config.resume or config.run.dir or 'FOLDER'} export.checkpoint=last"
        )
    file = Path(callback.best_model_path)
    step = read_step(file)
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    student.load_state_dict({name.removeprefix(_STUDENT): one for name, one in state.items() if name.startswith(_STUDENT)})
    score = callback.best_model_score
    return Chosen(BEST, step, last, callback.monitor, None if score is None else float(score))
