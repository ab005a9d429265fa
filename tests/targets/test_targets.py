"""The table of formats is what the configuration, the command line and the writers go by."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from qat.config import ExportConfig
from qat.config.run import RunConfig
from qat.export.__main__ import _parser
from qat.formats import get_format
from qat.formats.bitnet.writing import LINEAR_CLASSES
from qat.formats.folder import new_folder
from qat.formats.gguf import tensors as gguf_tensors
from qat.formats.pt2.program import KINDS
from qat.targets import FORMATS, format_for


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_says_what_its_code_takes(name: str) -> None:
    code, options = get_format(name), FORMATS[name].options
    own = {"model", "folder", "file", "tokenizer", "card", "check"}
    assert set(inspect.signature(code.save).parameters) - own == set(options)
    assert set(inspect.signature(code.unsupported).parameters) - own <= set(options)
    assert all(hasattr(code, what) for what in ("read_back", "report", "recorded"))
    for option in options.values():
        assert option.setting is None or hasattr(ExportConfig(), option.setting)
    assert {action.dest for action in _parser()._actions} >= set(options)


def test_allowed_values_are_the_writers() -> None:
    options = {name: record.options for name, record in FORMATS.items()}
    assert options["hf"]["linear_class"].allowed == LINEAR_CLASSES
    assert options["gguf"]["type"].allowed == gguf_tensors.TYPES
    assert set(options["gguf"]["floats"].allowed or ()) == set(gguf_tensors.FLOATS)
    assert options["pt2"]["kind"].allowed == KINDS


def test_a_run_may_ask_for_every_format_and_no_other() -> None:
    assert ExportConfig(formats=list(FORMATS)).formats == ["hf", "gguf", "pt2"]
    with pytest.raises(ValueError, match="export.formats='onnx' is not allowed; choose one of hf, gguf, pt2"):
        ExportConfig(formats=["onnx"])
    with pytest.raises(ValueError, match="export.pt2_kind='fast' is not allowed; choose one of exported, compiled"):
        ExportConfig(pt2_kind="fast")


@pytest.mark.parametrize(
    ("out", "asked", "found"),
    [
        ("DIR", None, "hf"),
        ("runs/llama-3.2", None, "hf"),
        ("x.gguf", None, "gguf"),
        ("a.b/x.pt2", None, "pt2"),
        ("DIR", "hf", "hf"),
        ("llama-3.2", "hf", "hf"),
        ("x.gguf", "gguf", "gguf"),
    ],
)
def test_the_suffix_says_the_format(out: str, asked: str | None, found: str) -> None:
    assert format_for(out, asked) == found


@pytest.mark.parametrize(
    ("out", "asked", "message"),
    [
        ("x.gguf", "hf", r"format hf is written to a folder, not to x.gguf"),
        ("x.gguf", "pt2", r"format pt2 is written to NAME.pt2, not to x.gguf"),
        ("DIR", "gguf", r"format gguf is written to NAME.gguf, not to DIR"),
        ("x.GGUF", None, r"format gguf is written to NAME.gguf, not to x.GGUF"),
        ("x.safetensors", None, r"no format writes .safetensors files"),
        ("x.onnx", None, r"no format writes .onnx files"),
        ("x", "onnx", r"'onnx' is not known; choose one of hf, gguf, pt2"),
    ],
)
def test_a_suffix_of_another_format_is_refused(out: str, asked: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        format_for(out, asked)


def test_no_folder_is_named_like_a_file(tmp_path: Path) -> None:
    for write in (lambda: RunConfig(dir="runs/x.gguf"), lambda: new_folder(tmp_path / "x.pt2").__enter__()):
        with pytest.raises(ValueError, match="named like a file of the format"):
            write()
    assert list(tmp_path.iterdir()) == []
