"""One whole file of every kind that qat reads, all of a model with 8 tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from faults.inputs import write_model, write_text
from faults.scenes import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
CHATS = [
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}],
    [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "sat."}, {"role": "user", "content": "why"}],
]


def write_all(folder: Path) -> Path:
    """All of them."""
    folder.mkdir()
    model, text = write_model(folder / "model"), write_text(folder / "text.txt")
    _write_run(folder, model, text)
    _write_exports(folder)
    _write_data(folder)
    _write_glass(folder)
    (folder / "conf/recipe").mkdir(parents=True)
    recipe = {"model": {"path": "x"}, "data": {"train": "y", "batch_size": 4}, "optim": {"lr": 0.01}, "trainer": {"max_steps": 3}}
    (folder / "conf/recipe/mine.yaml").write_text("# @package _global_\n" + json.dumps(recipe))
    return folder


def _write_run(folder: Path, model: Path, text: Path) -> None:
    words = [f"model.path={model}", f"data.train={text}", f"data.cache_dir={folder / 'cache'}", f"run.dir={folder / 'run'}"]
    subprocess.run([sys.executable, "-m", "qat.train", *words, *SETTINGS], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    names = sorted((folder / "cache").glob("*.bin"))
    (folder / "cache/tokens.bin").write_bytes(names[0].read_bytes())
    (folder / "cache/tokens.json").write_bytes(names[0].with_suffix(".json").read_bytes())


def _write_exports(folder: Path) -> None:
    import qat
    from qat.formats.bitnet import writing as hf
    from qat.formats.packed import folder as packed
    from qat.formats.pt2 import program

    model = packed.load(folder / "run/packed")
    from qat.config import ModelConfig
    from qat.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(path=str(folder / "run/packed")))
    packed.save(model, folder / "packed", tokenizer=tokenizer)
    hf.save(model, folder / "hf", tokenizer)
    _write_gguf(folder / "x.gguf")
    program.save(model, folder / "x.pt2")
    model.save_pretrained(folder / "shards", max_shard_size=9000)
    packed.save_state(model, folder / "state.safetensors")
    plain = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    (folder / "record.json").write_text(qat.convert(plain).to_json())


def _write_gguf(file: Path) -> None:
    """Of a model with a tokenizer that the format can hold."""
    from gguf_samples import byte_level
    from tiny import SIZES, packed_model
    from transformers import LlamaConfig

    from qat.formats.gguf import writing as gguf

    sizes = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    gguf.save(packed_model(LlamaConfig(**{**SIZES, **sizes})), file, byte_level(), floats="f32")


def _write_data(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = ["the cat sat.", "a dog ran,", "we see the sun."] * 4
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text, "more": {"a": [1]}}) for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "text.parquet")
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    pyarrow.parquet.write_table(pyarrow.table({"messages": CHATS}), folder / "chats.parquet")


def _write_glass(folder: Path) -> None:
    alphabet = ["▁", *"abcdehlnorstw."]
    merges = [["t", "h"], ["th", "e"]]
    vocabulary, width, inner, heads = 4 + len(alphabet) + len(merges), 8, int(8 * 8 / 3), 2
    random = np.random.default_rng(0)
    settings = {"vocab_size": vocabulary, "d_model": width, "n_layers": 1, "n_heads": heads, "n_kv_heads": heads}
    settings |= {"max_len": 16, "eps": 1e-5, "rope_base": 10000.0}
    shapes = {"E": (vocabulary, width), "norm_f.gamma": (width,)}
    shapes |= {f"blocks.0.attn.W_{one}": (width, width) for one in "QKVO"}
    shapes |= {"blocks.0.ffn.W1": (width, inner), "blocks.0.ffn.W3": (width, inner), "blocks.0.ffn.W2": (inner, width)}
    shapes |= {"blocks.0.norm1.gamma": (width,), "blocks.0.norm2.gamma": (width,)}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(folder / "glass.npz", __config__=np.array(json.dumps(settings)), **arrays)
    (folder / "glass.tokenizer.json").write_text(json.dumps({"alphabet": alphabet, "merges": merges}))
