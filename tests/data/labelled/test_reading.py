"""Labelled examples in files: what is read, and what is refused in one line that names the place."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qat.config import DataConfig
from qat.data.labelled import Example, Labels, read_examples
from qat.data.sources import Source

ROWS = [("good film", 1), ('a "bad" one', 0)]
TSV = "text\tlabel\n" + "\n".join(f"{text}\t{label}" for text, label in ROWS) + "\n"
CSV = 'text,label\n"good film",1\n"a ""bad"" one",0\n'


def read(file: Path, **more: object) -> list[tuple[tuple[str, ...], str]]:
    data = DataConfig(**more)  # type: ignore[arg-type]
    return [(example.texts, example.label) for example in read_examples(Source(str(file), data.text_field), data)]


@pytest.mark.parametrize(("name", "content"), [("a.tsv", TSV), ("a.csv", CSV), ("a.TSV", TSV + "\n")])
def test_tables_are_read_as_they_are_written(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert read(tmp_path / name) == [(("good film",), "1"), (('a "bad" one',), "0")]


def test_jsonl_and_parquet(tmp_path: Path) -> None:
    records = [{"text": text, "label": label} for text, label in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    expected = [(("good film",), "1"), (('a "bad" one',), "0")]
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.parquet") == expected


def test_two_texts_and_columns_of_other_names(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("id\tpremise\thypothesis\tgold\n7\tit rains\tit is wet\tyes\n")
    found = read(tmp_path / "a.tsv", text_field="premise", pair_field="hypothesis", label_field="gold")
    assert found == [(("it rains", "it is wet"), "yes")]


WRONG = [
    ("a.tsv", "", "a.tsv is empty; its first line must name the columns"),
    ("a.tsv", "text\tlabel\n", "has no examples"),
    ("a.tsv", "text\tlabels\ngood\t1\n", "a.tsv:2: there is no column 'label'; its columns are 'text', 'labels'"),
    ("a.tsv", "text\tlabel\ngood\n", "a.tsv:2: the row has 1 cells, the header 2 ('text', 'label')"),
    ("a.tsv", "text\tlabel\ngood\t1\tx\n", "a.tsv:2: the row has 3 cells"),
    ("a.tsv", "text\tlabel\ngood\t\n", "a.tsv:2: the label in 'label' is missing"),
    ("a.tsv", "text\tlabel\n \t1\n", "a.tsv:2: the field 'text' has no text"),
    ("a.tsv", "text\ttext\ngood\t1\n", "a.tsv:1: the column 'text' is there twice"),
    ("a.csv", 'text,label\n"good,1\n', "not a row of a .csv file"),
    ("a.jsonl", '{"text": "good", "label": null}', "a.jsonl:1: the label in 'label' is missing"),
    ("a.jsonl", '{"text": "good", "label": 0.5}', "the label in 'label' is float (0.5); a label is a word or a whole number"),
    ("a.jsonl", '{"text": "good"}', "a.jsonl:1: there is no field 'label'"),
    ("a.jsonl", '{"text": 3, "label": 1}', "the field 'text' holds int, not text"),
    ("a.txt", "good", "is plain text, which has no labels"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        read(tmp_path / name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"text\tlabel\n\xff\xfe\t1\n")
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        read(tmp_path / "a.tsv")


@pytest.mark.parametrize("name", ["none.tsv", "folder.tsv"])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(ValueError, match="there is no file|is no file"):
        read(tmp_path / name)


def examples(*labels: str) -> list[Example]:
    return [Example((f"text {i}",), label, f"a.tsv:{i}") for i, label in enumerate(labels, 2)]


def test_labels_are_numbered_by_value_or_alphabet() -> None:
    assert Labels.of(examples("10", "9", "-1", "9"), "a").names == ("-1", "9", "10")
    assert Labels.of(examples("pos", "neg", "pos"), "a").names == ("neg", "pos")
    assert Labels.of(examples("b", "a", "a"), "a").words([1, 0, 0]) == "a 2, b 1"


def test_labels_of_a_trained_head_keep_its_order() -> None:
    assert Labels.in_order(("pos", "neg"), examples("neg", "pos", "neg"), "a").names == ("pos", "neg")
    assert Labels.in_order(("LABEL_0", "LABEL_1"), examples("neg", "pos", "neg"), "a").names == ("neg", "pos")
    with pytest.raises(ValueError, match="has 2 labels, but the model's trained head has 3"):
        Labels.in_order(("LABEL_0", "LABEL_1", "LABEL_2"), examples("neg", "pos", "neg"), "a")


def test_an_unknown_label_is_named_with_its_place() -> None:
    labels = Labels.of(examples("pos", "neg", "neg"), "train.tsv")
    with pytest.raises(ValueError, match=r"^b.tsv:9: the label 'neutral' is none of those that are learned: 'neg', 'pos'$"):
        labels.number(Example(("x",), "neutral", "b.tsv:9"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("1", "1"), "every example of a has the label '1'; there must be at least two"),
        (("a", "b", "c"), "a has 3 labels in 3 examples; is data.label_field the label's column"),
    ],
)
def test_what_are_no_labels(labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Labels.of(examples(*labels), "a")
