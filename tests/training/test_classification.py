"""A run that classifies: fine-tuned, converted, trained with that model as its teacher, packed, loaded by transformers."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled import ROWS, write_bert, write_table
from tiny_run import TRAINER, losses
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from qat.config import ControlConfig, DataConfig, DistillConfig, ExportConfig, ModelConfig, OptimConfig, RunConfig
from qat.config import TrainConfig as Config
from qat.evaluation.measuring import evaluate
from qat.export.job import export
from qat.generation.job import generate
from qat.models.hub import load_tokenizer
from qat.reporting.result import read_result
from qat.reporting.table import print_table
from qat.train import run
from qat.training.tasks import code_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and examples to train and to validate on."""
    found = tmp_path_factory.mktemp("classification")
    write_bert(found / "bert")
    write_table(found / "train.tsv", ROWS[:60])
    write_table(found / "dev.tsv", ROWS[60:])
    return found


def configured(folder: Path, place: Path) -> Config:
    return Config(
        task="classification",
        model=ModelConfig(path=str(folder / "bert")),
        data=DataConfig(
            train=str(folder / "train.tsv"), valid=str(folder / "dev.tsv"), sequence_length=16, batch_size=8, bucket=32
        ),
        distill=DistillConfig(ce=0.5, kl=0.5, hidden=1.0),
        optim=OptimConfig(lr=5e-3, warmup_steps=4, anneal="soft"),
        trainer=replace(TRAINER, max_steps=60, val_every=30),
        control=ControlConfig(enabled=True, lr=5e-3, first=True),
        export=ExportConfig(formats=["hf"]),
        run=RunConfig(name="tiny", dir=str(place / "run")),
    )


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Config:
    return configured(folder, tmp_path)


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The result and folder of a whole run."""
    place = tmp_path_factory.mktemp("run")
    return run(configured(folder, place)), place / "run"


def test_a_whole_run_learns_and_is_proven(done: tuple[Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    result, folder = done
    assert result.status == "done" and list(result.accuracy) == ["control", "converted", "trained", "packed"]
    assert result.accuracy["control"] == result.accuracy["trained"] == result.accuracy["packed"] == 1.0
    assert result.accuracy.examples == 12 and result.accuracy.majority == 0.5
    assert result.further["f1"]["trained"] == 1.0 and result.objective == 0.0
    assert result.verification["packed_max_logit_difference"] == 0.0
    assert "causal language models" in result.export["skipped"]["hf"]
    assert "classifier" in result.conversion["skipped"] and "bert.pooler.dense" in result.conversion["converted"]
    print_table(result)
    text = capsys.readouterr().out
    assert "dev.tsv, accuracy" in text and "100.00" in text and "perplexity" not in text


def test_result_json_has_accuracy_in_place_of_perplexity(done: tuple[Any, Path]) -> None:
    values = json.loads((done[1] / "result.json").read_text())
    assert "perplexity" not in values and values["accuracy"]["trained"] == 1.0 and values["f1"]["measure"] == "f1"
    assert values["points_below_full_precision"] == 0.0
    again = read_result(done[1])
    assert again is not None and again.accuracy == done[0].accuracy and again.further == done[0].further


def test_validations_log_accuracy_and_f1(done: tuple[Any, Path]) -> None:
    with (done[1] / "metrics.csv").open() as lines:
        found = {row["step"]: row for row in csv.DictReader(lines) if row["val/accuracy"]}
    assert list(found) == ["30", "60"] and float(found["60"]["val/accuracy"]) == float(found["60"]["val/f1"]) == 1.0


def test_transformers_loads_the_packed_folder(done: tuple[Any, Path]) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(done[1] / "packed").eval()
    tokenizer = AutoTokenizer.from_pretrained(done[1] / "packed")
    texts = [text for text, _ in ROWS[60:]]
    with torch.inference_mode():
        found = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(-1)
    assert [model.config.id2label[i] for i in found.tolist()] == [label for _, label in ROWS[60:]]


def test_verbs_that_ask_for_text_refuse_a_classifier(done: tuple[Any, Path], folder: Path, tmp_path: Path) -> None:
    text, run_folder = folder / "text.txt", str(done[1])
    text.write_text("the film is good")
    asked: list[Callable[[], Any]] = [
        lambda: evaluate(run_folder, str(text)),
        lambda: generate(run_folder, "the film"),
        lambda: export(run_folder, str(tmp_path / "model.pt2")),
    ]
    for ask in asked:
        with pytest.raises(ValueError, match=r"is a classifier \(BertForSequenceClassification\), which predicts labels"):
            ask()


def _rows(file: Path) -> list[dict[str, str]]:
    """Every cell, a clock's too; the order of the columns is another one after a resume."""
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_resume_goes_on_from_the_fine_tuned_model(done: tuple[Any, Path], tmp_path: Path) -> None:
    """As if the run had been killed when QAT began: the control is not trained again, and everything comes out the same."""
    folder = shutil.copytree(done[1], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.csv").unlink()
    before = _rows(folder / "control" / "metrics.csv")
    again = run(Config(resume=str(folder)))
    assert again.status == "done" and again.accuracy == done[0].accuracy and again.control["tokens"] == done[0].control["tokens"]
    assert _rows(folder / "control" / "metrics.csv") == before
    assert losses(folder) == losses(done[1])


def test_a_fine_tuned_checkpoint_keeps_its_head_and_its_labels_order(folder: Path, config: Config, tmp_path: Path) -> None:
    names = {0: "pos", 1: "neg"}
    write_bert(tmp_path / "tuned", BertForSequenceClassification, id2label=names, label2id={"pos": 0, "neg": 1})
    config = replace(config, model=ModelConfig(path=str(tmp_path / "tuned")), control=ControlConfig())
    code = code_of(config)
    data = code.open_data(config, load_tokenizer(config.model), 1)
    model = code.load_model(config, data)
    kept = BertForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert code.ready(config) and model.config.id2label == names
    assert torch.equal(model.classifier.weight, kept.classifier.weight)
    first = data.valid.labels[0]  # type: ignore[union-attr]
    assert names[first] == ROWS[60][1]


def test_a_decoder_learns_too(folder: Path, tiny_model: Path, config: Config) -> None:
    """Llama has no padding token and takes no token types; its head sees the last token that is no padding."""
    plain = replace(config, model=ModelConfig(path=str(tiny_model)), distill=DistillConfig(), control=ControlConfig())
    result = run(replace(plain, data=replace(config.data, sequence_length=40), trainer=replace(TRAINER, max_steps=4)))
    assert result.status == "done" and list(result.accuracy) == ["converted", "trained", "packed"]
    assert result.verification["packed_max_logit_difference"] == 0.0 and "score" in result.conversion["skipped"]


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("control", {"enabled": False, "first": False}, "has no trained head; set control.enabled=true control.first=true"),
        ("data", {"kind": "chat"}, "task=classification with data.kind='chat' is not allowed; choose one of text"),
        ("data", {"train": "none.tsv"}, "data.train='none.tsv': there is no such file"),
        ("eval", {"context": 64}, "eval.context=64 means nothing to task=classification"),
        ("data", {"label_field": "gold"}, "there is no column 'gold'; its columns are 'text', 'label'"),
        ("model", {"teacher": "BASE"}, "has no trained head for classification, so it has nothing to teach"),
        ("data", {"sequence_length": 64}, "data.sequence_length=64 is above the model's context of 32 tokens"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    folder: Path, config: Config, section: str, changes: dict[str, Any], message: str
) -> None:
    changes = {key: str(folder / "bert") if value == "BASE" else value for key, value in changes.items()}
    wrong = replace(config, **{section: replace(getattr(config, section), **changes)})
    with pytest.raises(ValueError) as error:
        run(wrong)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path(str(config.run.dir)).exists()


def test_labels_mean_nothing_to_a_language_model(config: Config) -> None:
    with pytest.raises(ValueError, match="data.bucket=32 means nothing to task=language"):
        replace(config, task="language", control=ControlConfig()).check()


def test_a_missing_layer_of_the_base_model_is_no_new_head(folder: Path, config: Config, tmp_path: Path) -> None:
    shutil.copytree(folder / "bert", tmp_path / "bert")
    about = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps({**about, "num_hidden_layers": 3}))
    with pytest.raises(
        ValueError, match=r"has no weights for 16 parameters of a head for classification: bert\.encoder\.layer\.2"
    ):
        run(replace(config, model=ModelConfig(path=str(tmp_path / "bert"))))


def test_a_layer_too_many_is_no_other_head(folder: Path, config: Config, tmp_path: Path) -> None:
    shutil.copytree(folder / "bert", tmp_path / "bert")
    about = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps({**about, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="holds 16 tensors .*has no place"):
        run(replace(config, model=ModelConfig(path=str(tmp_path / "bert"))))
