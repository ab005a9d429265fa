"""What an earlier commit wrote is still read: a checkpoint goes on, a packed folder and a GGUF give the same numbers.

The files are written by that commit's own code, taken from the repository's history, so nothing binary lies in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_samples import SMALL, byte_level
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import qat  # noqa: F401  transformers reads our folders after it
from qat import inspect
from qat.train import main

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "1adae3a"
SETTINGS = [
    "data.sequence_length=16",
    "data.batch_size=4",
    "trainer.max_steps=4",
    "trainer.checkpoint_every=2",
    "trainer.log_every_n_steps=1",
    "trainer.progress=false",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "eval.max_tokens=128",
    "export.formats=[gguf]",
    "quant.granularity=channel",
    "distill=ce_kl",
    "trainer.samples=0",
]
LOGITS = "import sys, torch, qat; from transformers import AutoModelForCausalLM as A; ids = torch.arange(3, 19)[None];"
LOGITS += "torch.save(A.from_pretrained(sys.argv[1] + '/packed')(ids).logits, sys.argv[2])"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The earlier commit's tree."""
    folder = tmp_path_factory.mktemp("earlier")
    archive = folder / "tree.tar"
    done = subprocess.run(["git", "archive", "-o", str(archive), COMMIT], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"commit {COMMIT} is not in this clone's history: {done.stderr.strip()}")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "tree", filter="data")
    return folder / "tree"


@pytest.fixture(scope="module")
def run(earlier: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the earlier commit: `whole`, with its logits beside it, and `part`, which ended at step 2."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    tokenizer: Any = byte_level(eos_token="<|end|>")
    LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer)})).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = [f"model.path={folder / 'model'}", f"data.train={text_file}", f"data.cache_dir={folder / 'cache'}", *SETTINGS]
    _earlier(earlier, "-m", "qat.train", *words, f"run.dir={folder / 'whole'}")
    _earlier(earlier, "-m", "qat.train", *words, f"run.dir={folder / 'part'}", "trainer.max_steps=2", "optim.schedule=constant")
    _earlier(earlier, "-c", LOGITS, str(folder / "whole"), str(folder / "logits"))
    return folder


def _earlier(tree: Path, *words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_packed_folder_gives_the_same_logits(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "whole/packed")
    assert torch.equal(model(torch.arange(3, 19)[None]).logits, torch.load(run / "logits"))


def test_a_gguf_holds_the_same_codes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(run / "whole/model.gguf"), "--verify", str(run / "whole")]) == 0
    assert "14" in capsys.readouterr().out


def test_a_checkpoint_goes_on(run: Path) -> None:
    main([f"resume={run / 'part'}", "trainer.max_steps=4"])
    result = json.loads((run / "part/result.json").read_text())
    assert result["status"] == "done"
    rows = (run / "part/metrics.csv").read_text().splitlines()
    assert len(rows) == 5, "a header and four steps"
