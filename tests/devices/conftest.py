"""A model whose numbers are no chance: ranks draw other random numbers than one process would."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_model


@pytest.fixture(scope="session")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` without dropout."""
    sizes = {"hidden_size": 32, "intermediate_size": 43, "num_hidden_layers": 2}
    return write_model(tmp_path_factory.mktemp("models") / "still", **sizes, dropout=0.0)
