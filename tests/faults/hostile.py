"""Files made by hand to run code, to fill the memory or to never end. Each is refused in one line, and no canary ever sings."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from faults import forgeries, readers
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

Make = Callable[[Path, Path], None]
"""Called with the folder of samples and the canary, which must never exist."""
Read = Callable[[Path], Any]


def _templated(folder: Path) -> Any:
    tokenizer = load_tokenizer(ModelConfig(path=str(folder / "model")))
    tokenizer.chat_template = (folder / "template.jinja").read_text()
    return masked.read_chats(Source(str(folder / "chats.jsonl"), "messages"), tokenizer)


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
    "checkpoint: pickle": (partial(forgeries.checkpoint, sealed=False), READ["checkpoint bytes"]),
    "checkpoint: sealed pickle": (forgeries.checkpoint, READ["checkpoint bytes"]),
    "checkpoint: old pickle": (partial(forgeries.checkpoint, zipped=False), READ["checkpoint bytes"]),
    "pt2: pickled inputs": (
        partial(forgeries.entry, name="data/sample_inputs/model.pt", data=forgeries.pickled),
        READ["pt2 bytes"],
    ),
    "pt2: pickled constant": (
        partial(forgeries.entry, name="data/constants/tensor_0", data=forgeries.pickled),
        READ["pt2 bytes"],
    ),
    "pt2: a library": (partial(forgeries.entry, name="data/aotinductor/model/x.so", data=forgeries.pickled), READ["pt2 bytes"]),
    "pt2: path upwards": (partial(forgeries.entry, name="../../x", data=forgeries.pickled), READ["pt2 bytes"]),
    "pt2: absolute path": (partial(forgeries.entry, name="/tmp/x", data=forgeries.pickled), READ["pt2 bytes"]),
    "pt2: guards": (forgeries.guards, READ["pt2 bytes"]),
    "pt2: function": (partial(forgeries.program, old="torch.ops.qat", new="builtins.open"), READ["pt2 bytes"]),
    "pt2: system": (partial(forgeries.program, old="torch.ops.aten.add", new="os.system"), READ["pt2 bytes"]),
    "pt2: bomb": (
        partial(forgeries.entry, name="data/weights/weight_0", data=lambda _: bytes(1 << 28), compressed=True),
        READ["pt2 bytes"],
    ),
    "npz: pickled weight": (partial(forgeries.npz, member="E"), READ["glass weights"]),
    "npz: pickled settings": (partial(forgeries.npz, member="__config__"), READ["glass weights"]),
    "npz: one more pickle": (partial(forgeries.npz, member="more"), READ["glass weights"]),
    "npz: 4 TiB claimed": (forgeries.npz_claims, READ["glass weights"]),
    "npz: bomb of 6 GiB": (forgeries.npz_bomb, lambda f: load_glass_model(f / "glass.npz")),
    "config.yaml: callback": (
        partial(forgeries.saved, values=lambda c: {"callbacks": {"x": {**_TOUCH, "file": c}}}),
        READ["saved config"],
    ),
    "config.yaml: nested": (
        partial(
            forgeries.saved, values=lambda c: {"callbacks": {"x": {"_target_": _CALLBACK, "monitor": {**_TOUCH, "file": c}}}}
        ),
        READ["saved config"],
    ),
    "config.yaml: deep in a list": (
        partial(
            forgeries.saved, values=lambda c: {"callbacks": {"x": {"_target_": _CALLBACK, "monitor": [[{**_TOUCH, "file": c}]]}}}
        ),
        READ["saved config"],
    ),
    "config.yaml: logger": (
        partial(forgeries.saved, values=lambda c: {"loggers": {"x": {**_TOUCH, "file": c}}}),
        READ["saved config"],
    ),
    "config.yaml: system": (
        partial(forgeries.saved, values=lambda c: {"callbacks": {"x": {"_target_": "os.system", "command": f"touch {c}"}}}),
        READ["saved config"],
    ),
    "config.yaml: model's code": (
        partial(forgeries.saved, values=lambda c: {"model": {"path": "x", "trust_remote_code": True}}),
        READ["saved config"],
    ),
    "config.yaml: tag": (
        partial(forgeries.append, file="run/config.yaml", text="\nx: !!python/object/apply:builtins.open [CANARY, w]\n"),
        READ["saved config"],
    ),
    "config.yaml: tag of a name": (
        partial(forgeries.append, file="run/config.yaml", text="\nx: !!python/name:os.system ''\n"),
        READ["saved config"],
    ),
    "config.yaml: laughs": (partial(forgeries.append, file="run/config.yaml", text="\n" + LAUGHS), READ["saved config"]),
    "config.yaml: deep": (partial(forgeries.append, file="run/config.yaml", text="\nx: " + "[" * 200_000), READ["saved config"]),
    "config.yaml: interpolation": (
        partial(forgeries.append, file="run/config.yaml", text="\nx: ${oc.env:HOME}\n"),
        READ["saved config"],
    ),
    "recipe: tag": (
        partial(
            forgeries.append, file="conf/recipe/mine.yaml", text="\n? !!python/object/apply:builtins.open [CANARY, w]\n: 3\n"
        ),
        READ["recipe"],
    ),
    "recipe: laughs": (
        partial(forgeries.record_of, file="conf/recipe/mine.yaml", text="# @package _global_\n" + LAUGHS),
        READ["recipe"],
    ),
    "index: upwards": (partial(forgeries.index, name="../outside.safetensors"), lambda f: packed.load(f / "shards")),
    "index: absolute": (partial(forgeries.index, name="OUTSIDE"), lambda f: packed.load(f / "shards")),
    "index: pickle": (partial(forgeries.index, name="pytorch_model.bin"), lambda f: packed.load(f / "shards")),
    "auto_map: packed": (partial(forgeries.auto_map, model="packed", config="config.json", keys=_MODEL, more={}), _P),
    "auto_map: packed, new type": (partial(forgeries.auto_map, model="packed", config="config.json", keys=_MODEL, more=_NEW), _P),
    "auto_map: stock": (partial(forgeries.auto_map, model="hf", config="config.json", keys=_MODEL, more=_NEW), _B),
    "auto_map: model": (partial(forgeries.auto_map, model="model", config="config.json", keys=_MODEL, more=_NEW), _load("model")),
    "auto_map: any": (partial(forgeries.auto_map, model="packed", config="config.json", keys=_MODEL, more=_NEW), _any("packed")),
    "auto_map: any model": (
        partial(forgeries.auto_map, model="model", config="config.json", keys=_MODEL, more=_NEW),
        _any("model"),
    ),
    "auto_map: tokenizer": (
        partial(
            forgeries.auto_map,
            model="model",
            config="tokenizer_config.json",
            keys={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
            more={"tokenizer_class": "Evil"},
        ),
        _tokenizer("model"),
    ),
    **{
        f"gguf: {value:#x} at {at}": (partial(forgeries.gguf, at=at, value=value), READ["gguf"])
        for at in (8, 16, 24)
        for value in (1 << 32, 1 << 62, (1 << 64) - 1)
    },
    **{
        f"safetensors: header of {length:#x} in {file}": (partial(forgeries.header, file=file, length=length), read)
        for file, read in (
            ("packed/model.safetensors", _P),
            ("hf/model.safetensors", _B),
            ("model/model.safetensors", _load("model")),
        )
        for length in (0, 1 << 40, (1 << 64) - 1)
    },
    **{
        f"safetensors: shape {shape} in {file}": (partial(forgeries.header, file=file, shape=shape), read)
        for file, read in (
            ("packed/model.safetensors", _P),
            ("hf/model.safetensors", _B),
            ("model/model.safetensors", _load("model")),
        )
        for shape in ([1 << 40], [1 << 32, 1 << 32], [0])
    },
    **{
        f"link: {file} to {to}": (partial(forgeries.link, file=file, to=to), read)
        for file, to, read in (
            ("packed/model.safetensors", "model.safetensors", _P),
            ("packed/config.json", "config.json", _P),
            ("run/checkpoints/last.ckpt", "/dev/zero", READ["checkpoint bytes"]),
            ("text.txt", "text.txt", READ["text"]),
            ("x.gguf", "/dev/zero", READ["gguf"]),
        )
    },
    **{
        f"pipe: {file}": (partial(forgeries.pipe, file=file), read)
        for file, read in (
            ("run/config.yaml", READ["saved config"]),
            ("text.txt", READ["text"]),
            ("x.pt2", READ["pt2 bytes"]),
            ("packed/model.safetensors", _P),
        )
    },
    **{
        f"template: {text}": (partial(forgeries.template, text=text), _templated)
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
        partial(forgeries.record_of, file="text.jsonl", text='{"text": ' + "9" * 100_000 + "}"),
        READ["jsonl"],
    ),
    "jsonl: deep": (partial(forgeries.record_of, file="text.jsonl", text='{"text": ' + "[" * 200_000), READ["jsonl"]),
    "record: deep": (partial(forgeries.record_of, file="record.json", text='{"a": ' + "[" * 200_000), READ["record"]),
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
