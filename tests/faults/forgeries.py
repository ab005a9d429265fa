"""Hostile files made by hand: each function spoils one of the whole samples, in place."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from qat.training import checkpoints


class Evil:
    """Unpickled, it opens the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.canary), "w")


def checkpoint(folder: Path, canary: Path, *, sealed: bool = True, zipped: bool = True) -> None:
    file = folder / "run/checkpoints/last.ckpt"
    (folder / "run/checkpoints/previous.ckpt").unlink(missing_ok=True)
    torch.save({"global_step": 3, "more": Evil(canary)}, file, _use_new_zipfile_serialization=zipped)
    if sealed and zipped:
        checkpoints.seal(file)


def entry(folder: Path, canary: Path, *, name: str, data: Callable[[Path], bytes], compressed: bool = False) -> None:
    """An entry of x.pt2 replaced, or added."""
    file = folder / "x.pt2"
    with zipfile.ZipFile(file) as archive:
        whole = {one: archive.read(one) for one in archive.namelist()}
    found = next((one for one in whole if one.endswith(name)), f"x/{name}" if not name.startswith(("/", "..")) else name)
    whole[found] = data(canary)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for one, content in whole.items():
            archive.writestr(one, content)


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Evil(canary))


def program(folder: Path, canary: Path, *, old: str, new: str) -> None:
    with zipfile.ZipFile(folder / "x.pt2") as archive:
        name = next(one for one in archive.namelist() if one.endswith("models/model.json"))
        text = archive.read(name).decode()
    changed = text.replace(old, new.replace("CANARY", str(canary)))
    assert changed != text
    entry(folder, canary, name="models/model.json", data=lambda _: changed.encode())


def guards(folder: Path, canary: Path) -> None:
    with zipfile.ZipFile(folder / "x.pt2") as archive:
        name = next(one for one in archive.namelist() if one.endswith("models/model.json"))
        program = json.loads(archive.read(name))
    program["guards_code"] = [f"open({str(canary)!r}, 'w')"]
    entry(folder, canary, name="models/model.json", data=lambda _: json.dumps(program).encode())


def npz(folder: Path, canary: Path, *, member: str) -> None:
    with np.load(folder / "glass.npz") as whole:
        arrays = dict(whole)
    evil = np.empty(1, object)
    evil[0] = Evil(canary)
    np.savez(folder / "glass.npz", **{**arrays, member: evil})


def npz_claims(folder: Path, canary: Path) -> None:
    """A header of a few bytes that says 4 TiB."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"
    header = header.ljust(117) + b"\n"
    with zipfile.ZipFile(folder / "glass.npz", "a") as archive:
        archive.writestr("more.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


def npz_bomb(folder: Path, canary: Path) -> None:
    """6 GiB of zeros in 6 MB."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1610612736,), }".ljust(117) + b"\n"
    with (
        zipfile.ZipFile(folder / "glass.npz", "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("more.npy", "w", force_zip64=True) as entry,
    ):
        entry.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
        for _ in range(6 * 64):
            entry.write(bytes(1 << 24))


def saved(folder: Path, canary: Path, *, values: Callable[[str], dict[str, Any]]) -> None:
    file = folder / "run/config.yaml"
    whole = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**whole, **values(str(canary))}))


def append(folder: Path, canary: Path, *, file: str, text: str) -> None:
    with (folder / file).open("a") as out:
        out.write(text.replace("CANARY", str(canary)))


def index(folder: Path, canary: Path, *, name: str) -> None:
    file = folder / "shards/model.safetensors.index.json"
    index = json.loads(file.read_text())
    outside = folder / "outside.safetensors"
    outside.write_bytes(next((folder / "shards").glob("*.safetensors")).read_bytes())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name.replace("OUTSIDE", str(outside)))
    file.write_text(json.dumps(index))


def auto_map(folder: Path, canary: Path, *, model: str, config: str, keys: dict[str, Any], more: dict[str, Any]) -> None:
    (folder / model / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    file = folder / model / config
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": keys, **more}))


def gguf(folder: Path, canary: Path, *, at: int, value: int) -> None:
    data = bytearray((folder / "x.gguf").read_bytes())
    data[at : at + 8] = struct.pack("<Q", value)
    (folder / "x.gguf").write_bytes(data)


def header(folder: Path, canary: Path, *, file: str, length: int | None = None, shape: list[int] | None = None) -> None:
    data = (folder / file).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    if shape is not None:
        next(value for name, value in header.items() if name != "__metadata__")["shape"] = shape
    text = json.dumps(header).encode()
    (folder / file).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[8 + size :])


def link(folder: Path, canary: Path, *, file: str, to: str) -> None:
    (folder / "run/checkpoints/previous.ckpt").unlink()  # which takes the other's place
    (folder / file).unlink()
    (folder / file).symlink_to(to)


def pipe(folder: Path, canary: Path, *, file: str) -> None:
    (folder / file).unlink()
    os.mkfifo(folder / file)


def template(folder: Path, canary: Path, *, text: str) -> None:
    (folder / "template.jinja").write_text(text.replace("CANARY", str(canary)))


def record_of(folder: Path, canary: Path, *, text: str, file: str) -> None:
    (folder / file).write_text(text)
