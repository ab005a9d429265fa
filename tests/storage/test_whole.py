"""A process killed, or refused by the disk, at each file operation in turn: the target is the old one or the new one, whole."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qat.storage import exchange as exchanging
from qat.storage import names, new_file, new_folder, parse_json, repair, whole, write_text

OLD, NEW = {"a": "old a", "b": "old b"}, {"a": "new a", "c": "new c"}
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "fsync", "exchange")


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def write_folder(target: Path) -> None:
    with new_folder(target) as partial:
        fill(partial, NEW)


@pytest.fixture(params=["exchanged", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(whole, "exchange", lambda one, two: False)
    return request.param


def killed_at(step: int, action: Callable[[], None]) -> bool:
    """Whether a child of this process that does `action` was killed before its file operation of that number."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if event in EVENTS:
                if count == step:
                    os._exit(9)
                count += 1

        sync, exchange = os.fsync, exchanging.exchange
        os.fsync = lambda handle: (sys.audit("fsync"), sync(handle))[1]
        if whole.exchange is exchange:
            whole.exchange = lambda one, two: (sys.audit("exchange"), exchange(one, two))[1]
        sys.addaudithook(hook)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9), code
    return code == 9


def kills(action: Callable[[], None], before: Callable[[], None]) -> Iterator[int]:
    """Run `before` and a child with `action` once for each operation at which it can be killed."""
    for step in range(1000):
        before()
        if not killed_at(step, action):
            assert step > 5
            return
        yield step


def test_a_folder_is_the_old_or_the_new_one_whenever_its_writer_is_killed(tmp_path: Path, way: str) -> None:
    target, seen = tmp_path / "packed", set()

    def before() -> None:
        with new_folder(target) as partial:
            fill(partial, OLD)

    for step in kills(lambda: write_folder(target), before):
        if not target.exists():
            assert way == "two renames"
            repair(target)
        found = content(target)
        assert found in (OLD, NEW), step
        seen.add(tuple(found))
        write_folder(target)
        assert content(target) == NEW and [path.name for path in tmp_path.iterdir()] == ["packed"], step
    assert len(seen) == 2


def test_a_first_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "packed"

    def before() -> None:
        for path in [*target.iterdir()] if target.exists() else []:
            path.unlink()
        if target.exists():
            target.rmdir()

    for step in kills(lambda: write_folder(target), before):
        assert not target.exists() or content(target) == NEW, step
        names.sweep(target)
        assert {path.name for path in tmp_path.iterdir()} <= {"packed"}


def test_a_file_is_the_old_or_the_new_one_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    file, seen = tmp_path / "result.json", set()
    for step in kills(lambda: write_text(file, "new"), lambda: write_text(file, "old")):
        seen.add(file.read_text())
        write_text(file, "again")
        assert [path.name for path in tmp_path.iterdir()] == ["result.json"], step
    assert seen == {"old", "new"}


@pytest.mark.parametrize("operation", ["fsync", "rename", "replace", "mkdir"])
def test_a_refusing_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, operation: str) -> None:
    target = tmp_path / "packed"
    write_folder(target)
    real, calls = getattr(os, operation), []

    def refuse(*arguments: object, **more: object) -> object:
        calls.append(arguments)
        if len(calls) == fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **more)

    for fail_at in range(1, 12):
        calls.clear()
        monkeypatch.setattr(os, operation, refuse)
        try:
            with new_folder(target) as partial:
                fill(partial, OLD)
            with new_file(tmp_path / "one") as file:
                file.write_text("whole")
        except OSError as error:
            assert error.errno == errno.ENOSPC
        monkeypatch.setattr(os, operation, real)
        assert content(target) in (OLD, NEW)
        assert {path.name for path in tmp_path.iterdir()} <= {"packed", "one"}
        if len(calls) < fail_at:
            break
    else:
        pytest.fail("every try was refused")


def test_what_a_living_writer_fills_is_not_swept(tmp_path: Path) -> None:
    target = tmp_path / "packed"
    with new_folder(target) as mine:
        fill(mine, OLD)
        ready, go = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            with new_folder(target) as theirs:
                fill(theirs, NEW)
                os.write(ready[1], b"x")
                os.read(go[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
        names.sweep(target)
        assert len(list(tmp_path.iterdir())) == 2 and content(mine) == OLD
        os.write(go[1], b"x")
        os.waitpid(child, 0)
        assert content(target) == NEW and content(mine) == OLD
    assert content(target) == OLD and [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_a_leftover_under_our_own_process_number_is_swept_and_blocks_nothing(tmp_path: Path) -> None:
    """In a container each run has the same number."""
    left = tmp_path / f".packed.partial-{os.getpid()}-00000000-{names._host()}"
    left.mkdir()
    foreign = tmp_path / f".packed.partial-{os.getpid()}-note"
    foreign.mkdir()
    write_folder(tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == [foreign.name, "packed"]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda one, two: (done.append("renamed"), replace(one, two))[1])
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to name a handle by")
    write_text(tmp_path / "x", "text")
    assert [Path(name).name for name in done] == ["x", "renamed", tmp_path.name]


def test_nothing_is_left_where_the_block_fails(tmp_path: Path) -> None:
    for write in (new_folder, new_file):
        with pytest.raises(KeyboardInterrupt), write(tmp_path / "x"):
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_file_takes_no_folder_s_place(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(IsADirectoryError, match="/x is a folder, and a file is to be written; give the file's name"):
        write_text(tmp_path / "x", "a")
    assert [one.name for one in tmp_path.iterdir()] == ["x"]


def test_what_nobody_writes_again_is_swept_with_its_folder(tmp_path: Path) -> None:
    left, theirs = tmp_path / ".last.ckpt.partial-999999999-0a-nowhere", tmp_path / ".hidden"
    for folder in (left, theirs):
        folder.mkdir()
    with names.made(names.sibling(tmp_path / "x", names.PARTIAL)):
        names.sweep_folder(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
    assert theirs.exists() and not left.exists()


def test_json_that_is_nested_too_deep_is_a_value_error() -> None:
    assert parse_json('{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json("[" * 100_000)
