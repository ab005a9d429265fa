"""Perplexity against a two-line reference, windows token by token, and the verb's answers and errors."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import qat
from qat import evaluate
from qat.perplexity import perplexity, windows

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "models/stories260k").is_dir(), reason=f"{SHARED} is absent")


class Bigram(nn.Module):
    """The simplest causal model: logits of the next token are a row of a table."""

    def __init__(self, vocab: int = 11) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(vocab, vocab, generator=generator))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]


def tokens(count: int, vocab: int = 11) -> torch.Tensor:
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(1))


def scored(total: int, context: int, stride: int, batch_size: int = 8) -> list[int]:
    """Positions that are scored, in order, found by counting tokens 0, 1, 2, ..."""
    found = []
    for ids, start in windows(torch.arange(total), context, stride, batch_size):
        assert (ids[:, 1:] - ids[:, :-1] == 1).all() and ids.shape[1] <= context
        found += ids[:, start:].flatten().tolist()
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("total", [2, 7, 8, 9, 10, 16, 23, 24, 25])
def test_windows_without_overlap_leave_out_the_first_token_of_each(total, batch_size):
    assert scored(total, 8, 8, batch_size) == [i for i in range(total) if i % 8]


@pytest.mark.parametrize("stride", [1, 3, 7])
@pytest.mark.parametrize("total", [2, 7, 8, 9, 23, 24])
def test_windows_with_overlap_score_every_token_but_the_first_once(total, stride):
    assert scored(total, 8, stride, 2) == list(range(1, total))


def test_perplexity_equals_the_definition():
    model, ids = Bigram(), tokens(50)
    reference = F.cross_entropy(model.table[ids[:-1]], ids[1:]).exp().item()
    assert perplexity(model, ids, context=8, stride=3) == pytest.approx(reference, rel=1e-6)
    assert perplexity(model, ids, context=512) == pytest.approx(reference, rel=1e-6)
    kept = torch.tensor([i for i in range(50) if i % 8])
    reference = F.cross_entropy(model.table[ids[kept - 1]], ids[kept]).exp().item()
    assert perplexity(model, ids, context=8, batch_size=2) == pytest.approx(reference, rel=1e-6)


def test_perplexity_restores_training_mode_and_leaves_no_gradient():
    model = Bigram().train()
    perplexity(model, tokens(20), context=8)
    assert model.training and model.table.grad is None


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (tokens(1), {"context": 8}, "has 1 tokens"),
        (tokens(9), {"context": 1}, "context must be at least 2"),
        (tokens(9), {"context": 4, "stride": 5}, "stride in 1 to context"),
        (tokens(9).float(), {"context": 4}, "integer vector"),
        (tokens(9)[None], {"context": 4}, "integer vector"),
    ],
)
def test_bad_arguments(ids, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(Bigram(), ids, **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite(bad):
    model = Bigram()
    model.table.data.fill_(bad)
    with pytest.raises(ValueError, match="not finite"):
        perplexity(model, tokens(9), context=4)


def test_evaluate_is_the_home_of_the_public_name():
    assert evaluate.perplexity is perplexity


def test_help_needs_no_torch():
    code = "import sys, qat.evaluate; qat.evaluate._parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(qat.__file__).parents[1]).returncode == 0


def test_missing_model_and_text_are_one_line(capsys, tmp_path):
    assert evaluate.main([str(tmp_path / "none"), "--text", "x.txt"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qat.evaluate:") and error.count("\n") == 1 and "none" in error


def plain_perplexity(folder, text, count, context):
    """As anyone would compute it, with the stock tokenizer and transformers' own loss."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(Path(text).read_text())["input_ids"][:count])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss for window in ids.split(context)]
    return float(torch.stack(losses).mean().exp())


@needs_shared
def test_full_precision_stories(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("QAT_CACHE", str(tmp_path))
    text = str(SHARED / "data/tinystories/valid.txt")
    arguments = [str(SHARED / "models/stories260k"), "--text", text, "--max-tokens", "2048", "--json"]
    assert evaluate.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == pytest.approx(plain_perplexity(SHARED / "models/stories260k", text, 2048, 512), rel=1e-5)
    assert found["context"] == found["stride"] == 512 and found["tokens"] == 2048 and found["scored_tokens"] == 4 * 511
    assert found["kind"].startswith("full precision") and found["text"] == "valid.txt"
    assert evaluate.main([*arguments[:3], "--context", "513"]) == 2
    assert "512 positions" in capsys.readouterr().err
