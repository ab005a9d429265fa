"""A checksum inside a GGUF file, over every metadata key and tensor: the string `qat.sha256`, which other readers pass over.

It does not depend on the order in which keys and tensors lie, nor on the file's alignment, so that tools that copy a file keep it
valid. It is written in two steps: zeros of its length with the file, then the sum in their place.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from qat.formats.gguf.container import GGUFFile, read
from qat.formats.seal import Seal

KEY = "qat.sha256"
UNSET = "0" * 64
_OF_THE_FILE = ("general.alignment", "split.")


def write_sum(file: str | Path) -> None:
    """Seal a file as it is now; ValueError where it has no room for a sum."""
    found = read(file)
    if len(str(found.metadata.get(KEY))) != len(UNSET):
        raise ValueError(f"{file} has no place for a checksum ({KEY}): {Seal(False)}")
    text = digest(found).encode()
    at = found.places[KEY].stop - len(text)
    del found  # which maps the file
    with Path(file).open("r+b") as data:
        data.seek(at)
        data.write(text)


def seal(found: GGUFFile) -> Seal:
    """Compare what was read with its checksum."""
    if KEY not in found.metadata:
        return Seal(False)
    return Seal(True, () if found.metadata[KEY] == digest(found) else ("its metadata or tensors",))


def digest(found: GGUFFile) -> str:
    """SHA-256 over the sorted SHA-256 of all parts, hexadecimal."""
    parts = [
        _sum(f"key {key}", found.data[place])
        for key, place in found.places.items()
        if key != KEY and not key.startswith(_OF_THE_FILE)
    ]
    parts += [_sum(f"tensor {name} {one.kind} {list(one.shape)}", one.data) for name, one in found.tensors.items()]
    return hashlib.sha256(b"".join([f"GGUF {found.version}".encode(), *sorted(parts)])).hexdigest()


def _sum(what: str, data: object) -> bytes:
    found = hashlib.sha256(f"{what}\n".encode())
    found.update(data)  # type: ignore[arg-type]  # a buffer, of which numpy's types do not tell
    return found.digest()
