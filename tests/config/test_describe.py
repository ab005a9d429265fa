"""Every key is explained, and the explanation is that of the source."""

from __future__ import annotations

from qat.config import TrainConfig
from qat.config.describe import keys, sections


def test_every_key_is_explained() -> None:
    found = {key.name: key for key in keys(TrainConfig)}
    assert [name for name, key in found.items() if not key.doc] == []
    assert found["quant.eps"].doc == "Lower bound of every scale." and found["quant.eps"].default == 1e-5
    assert found["data.selfgen.top_k"].type == int | None and found["eval.texts"].default == {}
    assert found["seed"].doc.startswith("Seeds python")


def test_sections_are_the_classes_of_a_run() -> None:
    assert list(sections(TrainConfig))[:3] == ["model", "quant", "data"]
