"""Checksums of whole folders and files: every flipped byte is noticed, edits on purpose have a way, earlier files still load."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import gguf_samples
import pytest
import torch
from gguf_samples import byte_level
from tiny import packed_model
from transformers import AutoModelForCausalLM, LlamaConfig

from qat import inspect as verb
from qat.config import ModelConfig
from qat.formats.bitnet import reading as bitnet
from qat.formats.bitnet import writing as hf
from qat.formats.gguf import container, seal, stock
from qat.formats.gguf import writing as gguf
from qat.formats.inspection.report import examine
from qat.formats.packed import folder as packed
from qat.formats.pt2 import program
from qat.formats.pt2 import writing as pt2
from qat.formats.seal import SUMS, UNSEALED
from qat.models import any as anything
from qat.models.hub import load_model

TINY = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


def flips(file: Path, count: int) -> Iterator[int]:
    """Flip one bit at a time at seeded places of a file, which is whole again in the end."""
    whole = file.read_bytes()
    rng = random.Random(0)
    for at in rng.sample(range(len(whole)), min(count, len(whole))):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        yield at
    file.write_bytes(whole)


def noticed(path: Path) -> bool:
    """By inspect: as an error, or in what it says of the seal."""
    try:
        about, _ = examine(str(path))
    except ValueError:
        return True
    return about["seal"] not in ("intact", UNSEALED)


@pytest.mark.parametrize("save", [packed.save, hf.save])
def test_every_flip_in_every_file_of_a_folder_is_noticed(tmp_path: Path, save: object) -> None:
    save(packed_model(LlamaConfig(**TINY)), tmp_path / "x", tokenizer=byte_level())
    (tmp_path / "x/.lock").write_text("of others")
    assert examine(str(tmp_path / "x"))[0]["seal"] == "intact"
    for file in sorted((tmp_path / "x").glob("[!.]*")):
        for at in flips(file, 25):
            assert noticed(tmp_path / "x"), (file.name, at)
    assert examine(str(tmp_path / "x"))[0]["seal"] == "intact"


def test_readers_refuse_a_folder_with_an_altered_file(tmp_path: Path) -> None:
    model = packed_model()
    packed.save(model, tmp_path / "packed", tokenizer=byte_level())
    hf.save(model, tmp_path / "hf", tokenizer=byte_level())
    readers = {
        "packed": (packed.load, AutoModelForCausalLM.from_pretrained, lambda path: anything.load(str(path))),
        "hf": (bitnet.load, bitnet.load_master, lambda path: anything.load(str(path))),
    }
    for folder, loads in readers.items():
        for name in ("tokenizer.json", "generation_config.json", "config.json"):
            file = tmp_path / folder / name
            whole = file.read_text()
            file.write_text(whole + " ")  # the same JSON, but not the file that was written
            for load in loads:
                with pytest.raises(ValueError, match=rf"{name} altered; .* --reseal"):
                    load(tmp_path / folder)
            file.write_text(whole)
        for load in loads:
            load(tmp_path / folder)


def test_an_edit_on_purpose_is_sealed_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run/packed"
    packed.save(packed_model(), folder, tokenizer=byte_level())
    (tmp_path / "run/result.json").write_text('{"status": "done"}')
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 0.5}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert verb.main([str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert "altered: generation_config.json; not sealed: chat_template.jinja" in said.out and "--reseal" in said.err
    assert verb.main([str(tmp_path / "run"), "--reseal"]) == 0 and "intact" in capsys.readouterr().out
    assert packed.load(folder).generation_config.temperature == 0.5
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert verb.main([str(tmp_path / "run"), "--reseal"]) == 2 and "not a whole safetensors" in capsys.readouterr().err


def test_what_is_no_damage(tmp_path: Path) -> None:
    """An edited model card, a part of the files, the copy that transformers saves, and a folder of an earlier version."""
    folder, ids = tmp_path / "x", torch.arange(4)[None]
    model = packed_model()
    hf.save(model, folder)
    with (folder / "README.md").open("a") as card:
        card.write("Edited by hand.")
    (folder / "generation_config.json").unlink()
    bitnet.load(folder)
    assert verb.inspect(str(folder))["seal"] == "the model card was edited: README.md; gone: generation_config.json"
    packed.save(model, tmp_path / "packed")
    loaded = packed.load(tmp_path / "packed")
    loaded.save_pretrained(tmp_path / "copy")
    (tmp_path / "packed" / SUMS).unlink()
    for unsealed in ("copy", "packed"):
        assert verb.inspect(str(tmp_path / unsealed))["seal"] == UNSEALED
        assert torch.equal(packed.load(tmp_path / unsealed)(ids).logits, model(ids).logits)


def test_sha256sum_reads_the_sums(tmp_path: Path) -> None:
    packed.save(packed_model(), tmp_path / "x", tokenizer=byte_level())
    done = subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=tmp_path / "x", capture_output=True, text=True)
    assert done.returncode == 0 and "tokenizer.json: OK" in done.stdout, done.stderr


@pytest.mark.parametrize("change", [lambda lines: lines[:-1], lambda lines: [*lines, lines[0]], lambda lines: [], str.upper])
def test_damaged_sums_are_an_error(tmp_path: Path, change: object) -> None:
    file = packed.save(packed_model(), tmp_path / "x") / SUMS
    text = file.read_text()
    file.write_text(text.upper() if change is str.upper else "\n".join(change(text.split("\n"))))
    with pytest.raises(ValueError, match=f"{SUMS} is damaged"):
        packed.load(tmp_path / "x")


def test_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every flip it is noticed that the file is not what was written, or not ours; readers refuse it, until it is resealed."""
    file = tmp_path / "x.gguf"
    gguf.save(gguf_samples.packed_model("mistral"), file, floats="f32")
    found = container.read(file)
    assert seal.seal(found).sealed and str(seal.seal(found)) == "intact"
    whole, place = file.read_bytes(), found.places["general.name"]
    file.write_bytes(whole.replace(b"qat.version", b"qat.versien"))
    assert verb.inspect(str(file))["seal"] == "altered: its metadata or tensors"
    file.write_bytes(whole[: place.stop - 1] + b"y" + whole[place.stop :])
    with pytest.raises(ValueError, match="--reseal"):
        load_model(ModelConfig(path=str(file)))
    assert verb.main([str(file)]) == 2 and verb.main([str(file), "--reseal"]) == 0
    assert "intact" in capsys.readouterr().out
    load_model(ModelConfig(path=str(file)))
    for at in flips(file, 60):
        assert noticed(file) or b"qat.sha256" not in file.read_bytes(), at


def test_the_order_of_a_gguf_file_does_not_matter(tmp_path: Path) -> None:
    gguf.save(gguf_samples.packed_model("mistral"), tmp_path / "x.gguf")
    found = container.read(tmp_path / "x.gguf")
    metadata = {key: found.metadata[key] for key in reversed(found.metadata) if key != "general.architecture"}
    tensors = {name: found.tensors[name] for name in reversed(found.tensors)}
    stock.write(tmp_path / "y.gguf", str(found.metadata["general.architecture"]), metadata, tensors)
    assert (tmp_path / "x.gguf").read_bytes() != (tmp_path / "y.gguf").read_bytes()
    assert str(seal.seal(container.read(tmp_path / "y.gguf"))) == "intact"
    del metadata[seal.KEY]
    stock.write(tmp_path / "y.gguf", str(found.metadata["general.architecture"]), metadata, tensors)
    assert verb.inspect(str(tmp_path / "y.gguf"))["seal"] == UNSEALED
    assert verb.main([str(tmp_path / "y.gguf"), "--reseal"]) == 2  # there is no room for one


def test_a_pt2_file(tmp_path: Path) -> None:
    file = tmp_path / "x.pt2"
    pt2.save(packed_model(LlamaConfig(**TINY, max_position_embeddings=8)), file)
    assert verb.inspect(str(file))["seal"] == "intact" and verb.inspect(str(file))["kind"] == ".pt2, exported"
    for at in flips(file, 40):
        assert noticed(file), at
    for _ in flips(file, 2):
        with pytest.raises(ValueError, match="no .pt2 file that this machine can run"):
            program.load(file)
    assert program.load(file)(torch.zeros(1, 2, dtype=torch.int64)).shape == (1, 2, 8)
    assert verb.main([str(file), "--reseal"]) == 2  # nobody edits one by hand
