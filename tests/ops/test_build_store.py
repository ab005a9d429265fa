"""Which compiled libraries are loaded: those that nobody else could have put there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qat.ops.build import cpu as build_cpu
from qat.ops.build import store


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with one finished library, and a home beside it."""
    folder = tmp_path / "root"
    folder.mkdir(mode=0o755)
    library = folder / "x"
    store.fresh(library)
    (library / "qat_kernels.so").write_bytes(b"library")
    store.finish(library, "g++")
    monkeypatch.setenv("QAT_BUILD_DIR", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    store._elsewhere.cache_clear()
    store._say_once.cache_clear()
    return folder


def test_what_is_ours_alone_is_loaded(root: Path) -> None:
    assert store.build_root() == root and store.is_done(root / "x")


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_a_build_is_closed_whatever_the_umask(root: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        store.fresh(root / "y")
        (root / "y" / "qat_kernels.so").write_bytes(b"library")
        store.finish(root / "y", "g++")
    finally:
        os.umask(before)
    assert store.is_done(root / "y")


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757], ids=oct)
@pytest.mark.parametrize("path", ["x", "x/qat_kernels.so", "x/done"])
def test_what_others_may_write_is_built_anew(root: Path, path: str, mode: int, capfd: pytest.CaptureFixture[str]) -> None:
    (root / path).chmod(mode)
    assert not store.is_done(root / "x") and not store.is_done(root / "x")
    assert capfd.readouterr().err.count("are not loaded:") == 1
    store.fresh(root / "x")
    assert list((root / "x").iterdir()) == [] and [one.name for one in root.iterdir()] == ["x"]


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775], ids=oct)
def test_another_place_is_taken_where_others_may_write(root: Path, mode: int, capfd: pytest.CaptureFixture[str]) -> None:
    root.chmod(mode)
    assert store.build_root() == store.build_root() == root.parent / "home/.cache/qat/build"
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and f"no kernels are loaded from {root}: {root} can be written by others" in said


def test_a_folder_above_that_all_may_write(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "open").mkdir()
    (root / "open").chmod(0o777)
    monkeypatch.setenv("QAT_BUILD_DIR", str(root / "open" / "cache"))
    assert store.build_root() == root.parent / "home/.cache/qat/build"
    (root / "open").chmod(0o1777)  # as /tmp is: nobody renames what is not his
    assert store.build_root() == root / "open" / "cache"


def test_a_place_of_the_process_alone_where_the_home_is_open(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = root.parent / "home/.cache/qat/build"
    home.mkdir(parents=True)
    for folder in (root, home):
        folder.chmod(0o777)
    found = store.build_root()
    assert found not in (root, home) and found.is_dir() and found.stat().st_mode & 0o077 == 0 and found == store.build_root()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("path", ["", "x", "x/qat_kernels.so"])
def test_what_belongs_to_another_user(root: Path, path: str, capfd: pytest.CaptureFixture[str]) -> None:
    os.chown(root / path, 65534, 65534)
    assert store.build_root() != root if path == "" else not store.is_done(root / "x")
    assert "belongs to another user" in capfd.readouterr().err


@pytest.mark.parametrize("closed", [True, False])
def test_the_cpu_library_is_loaded_only_where_it_is_closed(root: Path, closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a finished one without a lock, so that a folder that cannot be written serves."""
    done: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *_: done.append(what)

    monkeypatch.setattr(build_cpu, "_loaded", [])
    monkeypatch.setattr(build_cpu, "_folder", lambda: (root / "x", "g++"))
    monkeypatch.setattr(build_cpu, "_build", note("built"))
    monkeypatch.setattr(torch.ops, "load_library", note("loaded"))
    (root / "x" / "qat_kernels.so").chmod(0o555 if closed else 0o666)
    build_cpu.load()
    assert done == (["loaded"] if closed else ["built"])
