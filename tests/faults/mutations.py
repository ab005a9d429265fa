"""Ways to damage a file, each from a seed: bytes, values of JSON and YAML, headers of safetensors, entries of archives."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from typing import Any

import yaml

VALUES = [None, True, -1, 0, 1, 3, 2**40, 1e308, -0.5, "", "x", "float16", "../../x", [], {}, [1, 2], {"a": 1}, [[]], "U8", "F32"]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """One of: truncated, bits flipped, a stretch zeroed, removed, repeated or moved, rubbish in front or behind."""
    if not data:
        return b"\0"
    at, length = rng.randrange(len(data)), rng.randint(1, 16)
    out = bytearray(data)
    match rng.randrange(7):
        case 0:
            return data[:at]
        case 1:
            for _ in range(rng.randint(1, 4)):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case 2:
            out[at : at + length] = bytes(len(out[at : at + length]))
        case 3:
            del out[at : at + length]
        case 4:
            out[at:at] = out[at : at + length]
        case 5:
            other = rng.randrange(len(data))
            out[other : other + length] = data[at : at + length]
        case _:
            rubbish = rng.randbytes(length)
            return rubbish + data if rng.random() < 0.5 else data + rubbish
    return bytes(out)


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def edited(value: Any, rng: random.Random) -> Any:
    """The JSON value with one of its entries replaced, removed, renamed, exchanged with another, or nested absurdly."""
    value = copy.deepcopy(value)
    container, key = rng.choice(places(value))
    match rng.randrange(5):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[key + rng.choice(["x", ".", " "])] = container.pop(key)
        case 2:
            other, place = rng.choice(places(value))
            container[key] = copy.deepcopy(other[place])
        case 3 if isinstance(container[key], int) and not isinstance(container[key], bool):
            container[key] += rng.choice([-1, 1, 4, 1000, 10**7])
        case _:
            container[key] = rng.choice(VALUES)
    return value


def edited_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header; the JSON texts inside its metadata are edited, too."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    inner = [key for key in metadata if metadata[key].startswith("{") and len(metadata[key]) > 2]
    if inner and rng.random() < 0.5:
        key = rng.choice(inner)
        metadata[key] = json.dumps(edited(json.loads(metadata[key]), rng))
    else:
        header = edited(header, rng)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def safetensors_mutation(data: bytes, rng: random.Random) -> bytes:
    """Half of them in the header."""
    return edited_header(data, rng) if rng.random() < 0.5 else flipped(data, rng)


def json_mutation(data: bytes, rng: random.Random) -> bytes:
    """Values, bytes, and sometimes a nesting that no parser follows."""
    if rng.random() < 0.7:
        return json.dumps(edited(json.loads(data), rng)).encode()
    return flipped(data, rng) if rng.random() < 0.95 else b"[" * 100_000


def lines_mutation(data: bytes, rng: random.Random) -> bytes:
    """Of a text with an object of JSON on each line."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json_mutation(lines[at], rng)
    return b"\n".join(lines) if rng.random() < 0.8 else flipped(data, rng)


def yaml_mutation(data: bytes, rng: random.Random) -> bytes:
    """Values, bytes, and what YAML has beyond JSON: tags, aliases that grow, nesting."""
    if rng.random() < 0.6:
        return yaml.safe_dump(edited(yaml.safe_load(data), rng)).encode()
    if rng.random() < 0.7:
        return flipped(data, rng)
    return data + rng.choice(YAML)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
YAML = [
    *(LAUGHS.encode(), b"seed: " + b"[" * 50_000, b"seed: &a [*a]\n", b"seed: !!python/object/apply:os.getpid []\n"),
    *(
        b"seed: ${seed}\n",
        b"seed: " + b"9" * 5000 + b"\n",
        b"? [a, b]\n: c\n",
        b"<<: {seed: 3}\n",
        b"---\nseed: 1\n",
        b"seed: 1e999\n",
    ),
]


def archive_mutation(data: bytes, rng: random.Random) -> bytes:
    """A zip archive written anew with one entry damaged, renamed, doubled or left out; its sums are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as written:
        chosen = rng.choice(archive.namelist())
        for name in archive.namelist():
            _write_entry(written, name, archive.read(name), rng if name == chosen else None)
    return out.getvalue()


def _write_entry(archive: zipfile.ZipFile, name: str, data: bytes, rng: random.Random | None) -> None:
    match rng.randrange(8) if rng else 9:
        case 0:
            return
        case 1:
            name += "x"
        case 2:
            name = "../" + name
        case 3:
            archive.writestr(name + "/../x", data)
        case 4 | 5 | 6 | 7:
            is_json = name.endswith(".json") and data[:1] in b"[{"
            data = json_mutation(data, rng) if is_json and rng else flipped(data, rng or random.Random(0))
    archive.writestr(name, data)


def archive_or_bytes(data: bytes, rng: random.Random) -> bytes:
    """Either."""
    return archive_mutation(data, rng) if rng.random() < 0.5 else flipped(data, rng)
