"""What torch.compile kept of other versions of the ops is not taken: they may have returned other shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qat.ops
from qat.ops.build import caches


def test_loading_the_ops_marks_what_is_compiled() -> None:
    assert qat.ops.library and caches.tag() in torch.compiler.config.cache_key_tag


def test_the_mark_is_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ops/bits").mkdir(parents=True)
    (tmp_path / "ops/bits/kept.py").write_text("bytes = 1")
    monkeypatch.setattr(caches, "_SOURCES", tmp_path)
    before = caches.tag()
    assert caches.tag() == before
    (tmp_path / "ops/bits/kept.py").write_text("bytes = 2")
    assert caches.tag() != before


def test_a_tag_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.compiler.config.patch(cache_key_tag="mine"):
        caches.keep_apart()
        caches.keep_apart()
        assert torch.compiler.config.cache_key_tag == "mine" + caches.tag()
