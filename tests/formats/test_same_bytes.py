"""The same model is the same bytes, in whatever process, folder and at whatever time it is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
WRITE = """
from pathlib import Path
from gguf_samples import byte_level, packed_model
from qat.formats.bitnet import writing as hf
from qat.formats.gguf import writing as gguf
from qat.formats.packed import folder as packed

model, card = packed_model("mistral", {"vocab_size": 320}), {"base_model": "b", "license": "mit", "results": {"packed": 4.5}}
tokenizer = byte_level(eos_token="<|end|>", additional_special_tokens=["<a>", "<b>", "<c>"])
packed.save(model, "packed", tokenizer=tokenizer, extra={"card": card})
hf.save(model, "model", tokenizer, card=card)
gguf.save(model, "model.gguf", tokenizer, card=card)
"""


def test_two_processes_write_the_same(tmp_path: Path) -> None:
    """Each with its own seed of hashes, and in its own folder, of which nothing is in the files."""
    folders = [tmp_path / "one", tmp_path / "a-longer-name"]
    path = os.pathsep.join((str(TESTS), str(TESTS.parent)))
    running = []
    for seed, folder in enumerate(folders):
        folder.mkdir()
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": str(seed)}
        running.append(subprocess.Popen([sys.executable, "-c", WRITE], cwd=folder, env=environment, stderr=subprocess.PIPE))
    for process in running:
        _, said = process.communicate()
        assert process.returncode == 0, said.decode()[-2000:]
    names = [sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) for folder in folders]
    assert names[0] == names[1] and {"packed/qat.sha256", "packed/tokenizer.json", "model/README.md"} < set(names[0])
    for name in names[0]:
        one, two = ((folder / name).read_bytes() for folder in folders)
        assert one == two, name
        assert not any(str(place).encode() in one for place in (tmp_path, TESTS.parent)), name
