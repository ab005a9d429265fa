"""What Hydra must know before it composes."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from qat.config.compose.keys import config_folder
from qat.config.run import TrainConfig


def register() -> None:
    """Give Hydra the schema and, as members of the group `recipe`, every file of recipes/.

    A search path cannot do it: Hydra names a group after its folder, and such groups are missing from `--help`.
    """
    store = ConfigStore.instance()
    store.store(name="schema", node=TrainConfig)
    for file in sorted(config_folder("recipes").glob("*.yaml")):
        store.store(group="recipe", name=file.stem, node=OmegaConf.load(file), package="_global_")
