"""Files made by hand to run code, to fill the memory or to never end. Each is refused in one line, and no canary ever sings."""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import yaml
from faults import readers
from faults.batches import SECONDS, forked, outcome
from faults.cases import Case
from faults.mutations import LAUGHS
from faults.samples import TEMPLATE

from qat.config import ModelConfig
from qat.data.chat import masked
from qat.data.sources import Source
from qat.formats.bitnet import reading as bitnet
from qat.formats.packed import folder as packed
from qat.models import any as any_model
from qat.models.glass import load_glass_model
from qat.models.hub import load_model, load_tokenizer
from qat.training import checkpoints

Make = Callable[[Path, Path], None]
"""Called with the folder of samples and the canary, which must never exist."""
Read = Callable[[Path], Any]


class Evil:
    """Unpickled, it opens the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.canary), "w")


def _checkpoint(folder: Path, canary: Path, *, sealed: bool = True, zipped: bool = True) -> None:
    file = folder / "run/checkpoints/last.ckpt"
    (folder / "run/checkpoints/previous.ckpt").unlink(missing_ok=True)
    torch.save({"global_step": 3, "more": Evil(canary)}, file, _use_new_zipfile_serialization=zipped)
    if sealed and zipped:
        checkpoints.seal(file)


def _entry(folder: Path, canary: Path, *, name: str, data: Callable[[Path], bytes], compressed: bool = False) -> None:
    """An entry of x.pt2 replaced, or added."""
    file = folder / "x.pt2"
    with zipfile.ZipFile(file) as archive:
        whole = {one: archive.read(one) for one in archive.namelist()}
    found = next((one for one in whole if one.endswith(name)), f"x/{name}" if not name.startswith(("/", "..")) else name)
    whole[found] = data(canary)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for one, content in whole.items():
            archive.writestr(one, content)


def _pickled(canary: Path) -> bytes:
    return pickle.dumps(Evil(canary))


def _program(folder: Path, canary: Path, *, old: str, new: str) -> None:
    with zipfile.ZipFile(folder / "x.pt2") as archive:
        name = next(one for one in archive.namelist() if one.endswith("models/model.json"))
        text = archive.read(name).decode()
    changed = text.replace(old, new.replace("CANARY", str(canary)))
    assert changed != text
    _entry(folder, canary, name="models/model.json", data=lambda _: changed.encode())


def _guards(folder: Path, canary: Path) -> None:
    with zipfile.ZipFile(folder / "x.pt2") as archive:
        name = next(one for one in archive.namelist() if one.endswith("models/model.json"))
        program = json.loads(archive.read(name))
    program["guards_code"] = [f"open({str(canary)!r}, 'w')"]
    _entry(folder, canary, name="models/model.json", data=lambda _: json.dumps(program).encode())


def _npz(folder: Path, canary: Path, *, member: str) -> None:
    with np.load(folder / "glass.npz") as whole:
        arrays = dict(whole)
    evil = np.empty(1, object)
    evil[0] = Evil(canary)
    np.savez(folder / "glass.npz", **{**arrays, member: evil})


def _npz_claims(folder: Path, canary: Path) -> None:
    """A header of a few bytes that says 4 TiB."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"
    header = header.ljust(117) + b"\n"
    with zipfile.ZipFile(folder / "glass.npz", "a") as archive:
        archive.writestr("more.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


def _npz_bomb(folder: Path, canary: Path) -> None:
    """6 GiB of zeros in 6 MB."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1610612736,), }".ljust(117) + b"\n"
    with (
        zipfile.ZipFile(folder / "glass.npz", "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("more.npy", "w", force_zip64=True) as entry,
    ):
        entry.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
        for _ in range(6 * 64):
            entry.write(bytes(1 << 24))


def _saved(folder: Path, canary: Path, *, values: Callable[[str], dict[str, Any]]) -> None:
    file = folder / "run/config.yaml"
    whole = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**whole, **values(str(canary))}))


def _append(folder: Path, canary: Path, *, file: str, text: str) -> None:
    with (folder / file).open("a") as out:
        out.write(text.replace("CANARY", str(canary)))


def _index(folder: Path, canary: Path, *, name: str) -> None:
    file = folder / "shards/model.safetensors.index.json"
    index = json.loads(file.read_text())
    outside = folder / "outside.safetensors"
    outside.write_bytes(next((folder / "shards").glob("*.safetensors")).read_bytes())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name.replace("OUTSIDE", str(outside)))
    file.write_text(json.dumps(index))


def _auto_map(folder: Path, canary: Path, *, model: str, config: str, keys: dict[str, Any], more: dict[str, Any]) -> None:
    (folder / model / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    file = folder / model / config
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": keys, **more}))


def _gguf(folder: Path, canary: Path, *, at: int, value: int) -> None:
    data = bytearray((folder / "x.gguf").read_bytes())
    data[at : at + 8] = struct.pack("<Q", value)
    (folder / "x.gguf").write_bytes(data)


def _header(folder: Path, canary: Path, *, file: str, length: int | None = None, shape: list[int] | None = None) -> None:
    data = (folder / file).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    if shape is not None:
        next(value for name, value in header.items() if name != "__metadata__")["shape"] = shape
    text = json.dumps(header).encode()
    (folder / file).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[8 + size :])


def _link(folder: Path, canary: Path, *, file: str, to: str) -> None:
    (folder / "run/checkpoints/previous.ckpt").unlink()  # which takes the other's place
    (folder / file).unlink()
    (folder / file).symlink_to(to)


def _pipe(folder: Path, canary: Path, *, file: str) -> None:
    (folder / file).unlink()
    os.mkfifo(folder / file)


def _template(folder: Path, canary: Path, *, text: str) -> None:
    (folder / "template.jinja").write_text(text.replace("CANARY", str(canary)))


def _templated(folder: Path) -> Any:
    tokenizer = load_tokenizer(ModelConfig(path=str(folder / "model")))
    tokenizer.chat_template = (folder / "template.jinja").read_text()
    return masked.read_chats(Source(str(folder / "chats.jsonl"), "messages"), tokenizer)


def _record_of(folder: Path, canary: Path, *, text: str, file: str) -> None:
    (folder / file).write_text(text)


def _load(path: str) -> Read:
    return lambda folder: load_model(ModelConfig(path=str(folder / path)))


def _tokenizer(path: str) -> Read:
    return lambda folder: load_tokenizer(ModelConfig(path=str(folder / path)))


def _any(path: str) -> Read:
    return lambda folder: any_model.load(str(folder / path))


READ = {name: reader.read for name, reader in readers.READERS.items()}
_P, _B = lambda f: packed.load(f / "packed"), lambda f: bitnet.load(f / "hf")
_CALLBACK = "lightning.pytorch.callbacks.EarlyStopping"
_TOUCH = {"_target_": "builtins.open", "mode": "w"}
_MODEL = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
_NEW = {"model_type": "evil"}
_WEIGHTS = [("packed/model.safetensors", _P), ("hf/model.safetensors", _B), ("model/model.safetensors", _load("model"))]
HOSTILE: dict[str, tuple[Make, Read]] = {
    "checkpoint: pickle": (partial(_checkpoint, sealed=False), READ["checkpoint bytes"]),
    "checkpoint: sealed pickle": (_checkpoint, READ["checkpoint bytes"]),
    "checkpoint: old pickle": (partial(_checkpoint, zipped=False), READ["checkpoint bytes"]),
    "pt2: pickled inputs": (partial(_entry, name="data/sample_inputs/model.pt", data=_pickled), READ["pt2 bytes"]),
    "pt2: pickled constant": (partial(_entry, name="data/constants/tensor_0", data=_pickled), READ["pt2 bytes"]),
    "pt2: a library": (partial(_entry, name="data/aotinductor/model/x.so", data=_pickled), READ["pt2 bytes"]),
    "pt2: path upwards": (partial(_entry, name="../../x", data=_pickled), READ["pt2 bytes"]),
    "pt2: absolute path": (partial(_entry, name="/tmp/x", data=_pickled), READ["pt2 bytes"]),
    "pt2: guards": (_guards, READ["pt2 bytes"]),
    "pt2: function": (partial(_program, old="torch.ops.qat", new="builtins.open"), READ["pt2 bytes"]),
    "pt2: system": (partial(_program, old="torch.ops.aten.add", new="os.system"), READ["pt2 bytes"]),
    "pt2: bomb": (
        partial(_entry, name="data/weights/weight_0", data=lambda _: bytes(1 << 28), compressed=True),
        READ["pt2 bytes"],
    ),
    "npz: pickled weight": (partial(_npz, member="E"), READ["glass weights"]),
    "npz: pickled settings": (partial(_npz, member="__config__"), READ["glass weights"]),
    "npz: one more pickle": (partial(_npz, member="more"), READ["glass weights"]),
    "npz: 4 TiB claimed": (_npz_claims, READ["glass weights"]),
    "npz: bomb of 6 GiB": (_npz_bomb, lambda f: load_glass_model(f / "glass.npz")),
    "config.yaml: callback": (
        partial(_saved, values=lambda c: {"callbacks": {"x": {**_TOUCH, "file": c}}}),
        READ["saved config"],
    ),
    "config.yaml: nested": (
        partial(_saved, values=lambda c: {"callbacks": {"x": {"_target_": _CALLBACK, "monitor": {**_TOUCH, "file": c}}}}),
        READ["saved config"],
    ),
    "config.yaml: deep in a list": (
        partial(_saved, values=lambda c: {"callbacks": {"x": {"_target_": _CALLBACK, "monitor": [[{**_TOUCH, "file": c}]]}}}),
        READ["saved config"],
    ),
    "config.yaml: logger": (partial(_saved, values=lambda c: {"loggers": {"x": {**_TOUCH, "file": c}}}), READ["saved config"]),
    "config.yaml: system": (
        partial(_saved, values=lambda c: {"callbacks": {"x": {"_target_": "os.system", "command": f"touch {c}"}}}),
        READ["saved config"],
    ),
    "config.yaml: model's code": (
        partial(_saved, values=lambda c: {"model": {"path": "x", "trust_remote_code": True}}),
        READ["saved config"],
    ),
    "config.yaml: tag": (
        partial(_append, file="run/config.yaml", text="\nx: !!python/object/apply:builtins.open [CANARY, w]\n"),
        READ["saved config"],
    ),
    "config.yaml: tag of a name": (
        partial(_append, file="run/config.yaml", text="\nx: !!python/name:os.system ''\n"),
        READ["saved config"],
    ),
    "config.yaml: laughs": (partial(_append, file="run/config.yaml", text="\n" + LAUGHS), READ["saved config"]),
    "config.yaml: deep": (partial(_append, file="run/config.yaml", text="\nx: " + "[" * 200_000), READ["saved config"]),
    "config.yaml: interpolation": (
        partial(_append, file="run/config.yaml", text="\nx: ${oc.env:HOME}\n"),
        READ["saved config"],
    ),
    "recipe: tag": (
        partial(_append, file="conf/recipe/mine.yaml", text="\n? !!python/object/apply:builtins.open [CANARY, w]\n: 3\n"),
        READ["recipe"],
    ),
    "recipe: laughs": (partial(_record_of, file="conf/recipe/mine.yaml", text="# @package _global_\n" + LAUGHS), READ["recipe"]),
    "index: upwards": (partial(_index, name="../outside.safetensors"), lambda f: packed.load(f / "shards")),
    "index: absolute": (partial(_index, name="OUTSIDE"), lambda f: packed.load(f / "shards")),
    "index: pickle": (partial(_index, name="pytorch_model.bin"), lambda f: packed.load(f / "shards")),
    "auto_map: packed": (partial(_auto_map, model="packed", config="config.json", keys=_MODEL, more={}), _P),
    "auto_map: packed, new type": (partial(_auto_map, model="packed", config="config.json", keys=_MODEL, more=_NEW), _P),
    "auto_map: stock": (partial(_auto_map, model="hf", config="config.json", keys=_MODEL, more=_NEW), _B),
    "auto_map: model": (partial(_auto_map, model="model", config="config.json", keys=_MODEL, more=_NEW), _load("model")),
    "auto_map: any": (partial(_auto_map, model="packed", config="config.json", keys=_MODEL, more=_NEW), _any("packed")),
    "auto_map: any model": (partial(_auto_map, model="model", config="config.json", keys=_MODEL, more=_NEW), _any("model")),
    "auto_map: tokenizer": (
        partial(
            _auto_map,
            model="model",
            config="tokenizer_config.json",
            keys={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
            more={"tokenizer_class": "Evil"},
        ),
        _tokenizer("model"),
    ),
    **{
        f"gguf: {value:#x} at {at}": (partial(_gguf, at=at, value=value), READ["gguf"])
        for at in (8, 16, 24)
        for value in (1 << 32, 1 << 62, (1 << 64) - 1)
    },
    **{
        f"safetensors: header of {length:#x} in {file}": (partial(_header, file=file, length=length), read)
        for file, read in (
            ("packed/model.safetensors", _P),
            ("hf/model.safetensors", _B),
            ("model/model.safetensors", _load("model")),
        )
        for length in (0, 1 << 40, (1 << 64) - 1)
    },
    **{
        f"safetensors: shape {shape} in {file}": (partial(_header, file=file, shape=shape), read)
        for file, read in (
            ("packed/model.safetensors", _P),
            ("hf/model.safetensors", _B),
            ("model/model.safetensors", _load("model")),
        )
        for shape in ([1 << 40], [1 << 32, 1 << 32], [0])
    },
    **{
        f"link: {file} to {to}": (partial(_link, file=file, to=to), read)
        for file, to, read in (
            ("packed/model.safetensors", "model.safetensors", _P),
            ("packed/config.json", "config.json", _P),
            ("run/checkpoints/last.ckpt", "/dev/zero", READ["checkpoint bytes"]),
            ("text.txt", "text.txt", READ["text"]),
            ("x.gguf", "/dev/zero", READ["gguf"]),
        )
    },
    **{
        f"pipe: {file}": (partial(_pipe, file=file), read)
        for file, read in (
            ("run/config.yaml", READ["saved config"]),
            ("text.txt", READ["text"]),
            ("x.pt2", READ["pt2 bytes"]),
            ("packed/model.safetensors", _P),
        )
    },
    **{
        f"template: {text}": (partial(_template, text=text), _templated)
        for text in (
            "{% for i in range(1000000000) %}x{% endfor %}",
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "{{ 'x' * 10000000000 }}",
            "{{ 10 ** 10000000000 }}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}" + TEMPLATE,
            "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}" + TEMPLATE,
            "{{ messages.__init__.__globals__['open']('CANARY', 'w') }}" + TEMPLATE,
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% include '/etc/passwd' %}",
            "{{ raise_exception('x' * 100000) }}",
        )
    },
    "jsonl: a number of 100,000 digits": (
        partial(_record_of, file="text.jsonl", text='{"text": ' + "9" * 100_000 + "}"),
        READ["jsonl"],
    ),
    "jsonl: deep": (partial(_record_of, file="text.jsonl", text='{"text": ' + "[" * 200_000), READ["jsonl"]),
    "record: deep": (partial(_record_of, file="record.json", text='{"a": ' + "[" * 200_000), READ["record"]),
}


def cases(folder: Path) -> Iterator[Case]:
    """One trial each."""
    for name, (make, read) in HOSTILE.items():
        yield Case("handmade hostile files", name, partial(_refused, folder, make, read))


def _refused(folder: Path, make: Make, read: Read) -> list[str]:
    """It must be refused, and whatever asks whether to trust is told yes, so that asking would be seen."""
    canary = folder.with_name(f"canary-{os.getpid()}")
    canary.unlink(missing_ok=True)

    def work(place: Path, lines: TextIO) -> None:
        make(place, canary)
        asked, answer = os.pipe()
        os.write(answer, b"y\n" * 100)
        os.dup2(asked, 0)
        signal.alarm(SECONDS)
        if wrong := outcome(lambda: bool(read(place)) and False):
            print(f"! {wrong}", file=lines)

    wrong = forked(folder, work)
    return [*wrong, *(["code of the file was run"] if canary.exists() else [])]
