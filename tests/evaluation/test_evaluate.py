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
from qat.formats.packed import folder as packed
from qat.metrics.agreement import agreement, layer_errors
from qat.metrics.perplexity import log_likelihood, perplexity, windows


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


def test_full_precision_stories(shared, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("QAT_CACHE", str(tmp_path))
    text = str(shared / "data/tinystories/valid.txt")
    arguments = [str(shared / "models/stories260k"), "--text", text, "--max-tokens", "2048", "--json"]
    assert evaluate.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == pytest.approx(plain_perplexity(shared / "models/stories260k", text, 2048, 512), rel=1e-5)
    assert found["context"] == found["stride"] == 512 and found["tokens"] == 2048 and found["scored_tokens"] == 4 * 511
    assert found["kind"].startswith("full precision") and found["text"] == "valid.txt"
    assert evaluate.main([*arguments[:3], "--context", "513"]) == 2
    assert "512 positions" in capsys.readouterr().err


def test_agreement_equals_the_definition():
    model, reference, ids = Bigram(), Bigram(), tokens(50)
    with torch.no_grad():
        model.table.add_(torch.randn(11, 11))
    found = agreement(model, reference, list(windows(ids, 8, 3)))
    p, q = reference.table[ids[:-1]].softmax(-1), model.table[ids[:-1]].softmax(-1)
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5) and found.tokens == 49
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    itself = agreement(model, model, list(windows(ids, 8)))
    total, count = log_likelihood(model, windows(ids, 8))
    assert itself == (0.0, 1.0, pytest.approx(total / count, rel=1e-6), 43) and count == 43
    with pytest.raises(ValueError, match="11 tokens against the teacher's 12"):
        agreement(model, Bigram(12), list(windows(ids, 8)))


def test_layer_errors_tell_a_layer_s_own_from_what_it_inherits(tiny_model):
    reference = AutoModelForCausalLM.from_pretrained(tiny_model).eval().requires_grad_(False)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval().requires_grad_(False)
    qat.convert(model, qat.QuantConfig())
    qat.pack(model)
    ids = torch.randint(31, (2, 16))
    errors = layer_errors(model, reference, ids)
    assert len(errors) == 14 and "lm_head" not in errors
    first = errors["model.layers.0.self_attn.q_proj"]
    assert first.local == first.accumulated > 0.05  # nothing before it is quantized
    name, seen = "model.layers.1.mlp.down_proj", {}
    reference.get_submodule(name).register_forward_hook(lambda _, x, y: seen.update(x=x[0], y=y))
    reference(input_ids=ids)
    expected = (model.get_submodule(name)(seen["x"]) - seen["y"]).norm() / seen["y"].norm()
    assert errors[name].local == pytest.approx(float(expected), rel=1e-5) and errors[name].accumulated > errors[name].local
    with pytest.raises(ValueError, match="no layer of the model is quantized"):
        layer_errors(reference, reference, ids)


@pytest.fixture
def packed_folder(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval().requires_grad_(False)
    qat.convert(model, qat.QuantConfig())
    qat.pack(model)
    return packed.save(model, tmp_path / "run" / "packed", tokenizer=AutoTokenizer.from_pretrained(tiny_model))


def test_everything_beside_a_teacher(packed_folder, tiny_model, text_file, capsys):
    arguments = [str(packed_folder), "--text", str(text_file), "--max-tokens", "400", "--context", "64", "--stride", "32"]
    more = ["--teacher", str(tiny_model), "--layers", "--samples", "2"]
    assert evaluate.main([*arguments, *more, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    teacher = found["teacher"]
    assert evaluate.main([str(tiny_model), *arguments[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == teacher["perplexity"]
    assert found["scored_tokens"] == 399 and 0 < teacher["kl"] < 1 and 0 < teacher["top1"] < 1 and len(teacher["layers"]) == 14
    first, second = found["samples"]
    assert first["prompt"].replace(" ", "").startswith("thecatsat") and first["prompt"] != second["prompt"]
    assert first["continuation"] and first["teacher"] and "remark" not in found
    assert evaluate.main([*arguments, *more]) == 0
    shown = capsys.readouterr().out
    assert "KL " in shown and "top-1 agreement" in shown and "teacher: '" in shown and "relative error of 14 layers" in shown


def test_a_smaller_head_changes_the_perplexity_a_little(packed_folder, text_file):
    values = [
        evaluate.evaluate(str(packed_folder), str(text_file), max_tokens=500, head=head) for head in ("full", "8bit", "6bit")
    ]
    full, eight, six = (value["perplexity"] for value in values)
    assert eight != full != six and eight == pytest.approx(full, rel=0.01) and six == pytest.approx(full, rel=0.05)
    assert values[2]["kind"].endswith("6bit head")


def test_a_text_shorter_than_a_window_is_remarked(packed_folder, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("the cat sat.")
    assert evaluate.main([str(packed_folder), "--text", str(tmp_path / "short.txt")]) == 0
    assert "shorter than one window: its 12 tokens" in capsys.readouterr().out


def test_an_export_that_was_skipped_says_why(packed_folder, capsys):
    run = packed_folder.parent
    (run / "result.json").write_text(json.dumps({"export": {"skipped": {"hf": "groups of 32"}}}))
    assert evaluate.main([str(run / "model"), "--text", "pydoc_data.topics"]) == 2
    error = capsys.readouterr().err
    assert "groups of 32" in error and str(run) in error and "model.path" not in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --text FILE, --tasks NAMES"),
        (["--tasks", "x", "--teacher", "y"], "give --text FILE"),
        (["--text", "x", "--layers"], "give --teacher MODEL"),
        (["--text", "x", "--samples", "-1"], "--samples -1"),
        (["--text", "x", "--limit", "3"], "belong to --tasks"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys):
    assert evaluate.main(["anything", *flags]) == 2
    assert message in capsys.readouterr().err


TASKS = Path(qat.__file__).parents[1] / "benchmarks" / "tasks"


def write_tasks_data(folder: Path) -> None:
    """Made-up data in the files' real forms: the grammatical sentence is one that a model of its own text prefers."""
    for name in ("piqa", "arc_easy", "blimp"):
        (folder / name).mkdir(parents=True)
    goal = {"goal": "the cat", "sol1": "sat.", "sol2": "zzqqxx"}
    (folder / "piqa/valid.jsonl").write_text("".join(json.dumps(goal) + "\n" for _ in range(4)))
    (folder / "piqa/valid-labels.lst").write_text("0\n0\n0\n1\n")
    choices = [{"text": "the sun.", "label": "A"}, {"text": "qxz", "label": "B"}]
    question = {"question": {"stem": "we see", "choices": choices}, "answerKey": "A"}
    (folder / "arc_easy/arc_easy_test.jsonl").write_text((json.dumps(question) + "\n") * 2)
    pair = {"sentence_good": "a dog ran,", "sentence_bad": "xqzj kxqv"}
    (folder / "blimp/a.jsonl").write_text((json.dumps(pair) + "\n") * 3)


def run_tasks_on(folder, data, capsys, *flags):
    tasks = ["--tasks", "local_piqa,local_arc_easy,local_blimp", "--include-path", str(TASKS), "--task-data", str(data)]
    assert evaluate.main([str(folder), *tasks, *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["tasks"]


def test_zero_shot_by_lm_eval_on_a_packed_model(packed_folder, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    write_tasks_data(tmp_path / "data")
    found = run_tasks_on(packed_folder, tmp_path / "data", capsys)
    piqa = found["local_piqa"]
    assert piqa["acc"] in (0.25, 0.75) and piqa["examples"] == 4 and found["local_blimp"]["acc"] in (0.0, 1.0)
    model, tokenizer = packed.load(packed_folder), AutoTokenizer.from_pretrained(packed_folder)
    sums = []
    for answer in (" sat.", " zzqqxx"):
        context, whole = (tokenizer(f"Question: the cat\nAnswer:{end}")["input_ids"] for end in ("", answer))
        ids = torch.tensor(whole)
        logs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        sums.append(float(logs[len(context) - 1 : -1].gather(1, ids[len(context) :, None]).sum()))
    assert piqa["acc"] == (0.75 if sums[0] > sums[1] else 0.25)


def test_tasks_that_cannot_run_are_one_line(packed_folder, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    wrong = {
        "choose from local_arc_easy, local_blimp, local_piqa": ["--tasks", "hellaswag", "--include-path", str(TASKS)],
        "there is no folder": ["--tasks", "local_piqa", "--include-path", str(TASKS), "--task-data", str(tmp_path)],
        "there is no such folder": ["--tasks", "local_piqa", "--include-path", str(tmp_path / "none")],
    }
    for message, flags in wrong.items():
        assert evaluate.main([str(packed_folder), *flags]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("qat.evaluate:") and message in error


def test_tasks_need_a_token_to_begin_with(packed_folder, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    config = json.loads((packed_folder / "tokenizer_config.json").read_text())
    config.update(eos_token=None, bos_token=None)
    (packed_folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert evaluate.main([str(packed_folder), "--tasks", "local_piqa", "--include-path", str(TASKS)]) == 2
    assert "the tokenizer has neither BOS nor EOS" in capsys.readouterr().err


def test_zero_shot_on_real_data(shared, capsys):
    """stories260k knows no science, but which of two sentences is grammatical; bounds are wide of what was measured."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    found = run_tasks_on(shared / "models/stories260k", shared / "data", capsys, "--limit", "100")
    assert {name: found[name]["examples"] for name in found} == {"local_piqa": 100, "local_arc_easy": 100, "local_blimp": 100}
    assert 0.1 < found["local_arc_easy"]["acc"] < 0.5 < found["local_blimp"]["acc"] and 0.3 < found["local_piqa"]["acc"] < 0.75
