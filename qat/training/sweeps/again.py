"""The same command line again: whether run.dir holds the run that it describes, so that one line starts it and continues it.

That is what a cluster repeats: `sbatch --requeue`, `torchrun --max-restarts`, a Kubernetes Job. What may differ from the run in
the folder is what may change on any resume (`qat.config.compose.resume`); with anything else it is another run, and refused.
Rejected: to start another run beside it, which would leave the first one's checkpoints unfound by a slip in a script.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qat.config import TrainConfig
from qat.config.compose.resume import compared
from qat.config.compose.saved import saved_config
from qat.config.run import AUTO
from qat.reporting import updates
from qat.training.folder import holds_run, is_named_by_time


def answered(config: TrainConfig) -> TrainConfig:
    """`resume=auto` as the folder to continue, or as None where a new run begins; any other configuration is left as it is.

    Raises:
        ValueError: run.dir is a new folder each time, or holds another run.
    """
    if config.resume != AUTO:
        return config
    folder = Path(config.run.dir or "")
    if config.run.dir and holds_run(folder):
        config = as_settled(config, folder)
        _check_same(config, folder)
        return replace(config, resume=str(folder))
    if not config.run.dir or is_named_by_time(folder):
        raise ValueError(
            f"resume=auto needs a run.dir that is the same at each start, as run.dir=runs/{config.run.name}/first;"
            f" run.dir={config.run.dir or 'null'} is another one every second"
        )
    return replace(config, resume=None)


def as_settled(config: TrainConfig, folder: Path) -> TrainConfig:
    """With what it leaves open until model and text are known as the run in `folder` has settled it, where that said the same.

    Args:
        config: settled as far as it can be without them.
    """
    saved = saved_config(str(folder))
    optim, trainer = config.optim, config.trainer
    if optim.lr is None and saved.optim.lr_multiple == optim.lr_multiple:
        optim = replace(optim, lr=saved.optim.lr)
    each = [updates.sequences_per_update(one) for one in (config, saved)]
    if trainer.max_epochs is not None and saved.trainer.max_epochs == trainer.max_epochs and each[0] == each[1]:
        trainer = replace(trainer, max_steps=saved.trainer.max_steps)
    return replace(config, optim=optim, trainer=trainer)


def _check_same(config: TrainConfig, folder: Path) -> None:
    try:
        compared(config, str(folder))
    except ValueError as error:
        raise ValueError(f"resume=auto, but run.dir={folder} holds another run: {error}") from error
