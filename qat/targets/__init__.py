"""Where a packed model can go: the table of formats, as records that say what each needs, takes and writes.

The records are data, below the configuration, so that its keys, the command line and the writers ask one and the same row; the
code of a format lies in `qat.formats`. Our own packed folder is always written and is none of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLOATS = ("source", "float32", "bfloat16", "float16")
"""How what is not quantized is stored in folders: `source` is the dtype that each tensor had in the pretrained model."""

ROOM = ("planes", "biases", "activations")
"""What a file may have room for beside one matrix of codes and its scale a layer: sums of planes whose scales have fixed ratios,
biases of layers whose architecture has none,
and inputs that are rounded in another way than to 8 bits, or rotated."""


@dataclass(frozen=True)
class Option:
    """A keyword of a format's `save`: `--name` on the command line, `export.<setting>` in a run."""

    help: str
    allowed: tuple[str, ...] | None = None
    """None: any text."""
    setting: str | None = None
    """None: a run has its default."""
    rounds: bool = False
    """Whether what is not quantized is rounded to it in the model (`qat.formats.dtypes`), before anything is compared."""


@dataclass(frozen=True)
class Format:
    """One format. `module` has `unsupported`, `save`, `read_back`, `report` and `recorded`, with the options as keywords."""

    module: str
    reader: str
    """Who reads it, in words."""
    suffix: str = ""
    """Of a file; a format without one is a folder."""
    options: Mapping[str, Option] = field(default_factory=dict)
    room: tuple[str, ...] = ()
    """Of `ROOM`."""
    is_a_stage: bool = True
    """Whether the reader computes the model as packed, so that its perplexity is one of the run's stages."""

    @property
    def in_run(self) -> str:
        """Its name in a run's folder."""
        return f"model{self.suffix}"

    @property
    def path(self) -> str:
        """What to give as its target, in words."""
        return f"NAME{self.suffix}" if self.suffix else "a folder"

    def of_run(self, settings: Any) -> dict[str, Any]:
        """The options as the section `export` of a run's configuration has them."""
        return {name: getattr(settings, option.setting) for name, option in self.options.items() if option.setting}


FORMATS: dict[str, Format] = {
    "hf": Format(
        "qat.formats.bitnet.writing",
        "stock transformers",
        options={
            "linear_class": Option("scale convention (default: bitlinear)", ("bitlinear", "autobitlinear"), "linear_class"),
            "floats": Option(
                "of what is not quantized (default: source, as the pretrained model has it)", FLOATS, "floats", True
            ),
        },
    ),
    "gguf": Format(
        "qat.formats.gguf.writing",
        "llama.cpp",
        ".gguf",
        {
            "type": Option(
                "of quantized layers (default: auto, by each layer's shape); i2_s is for bitnet.cpp on x86",
                ("auto", "tq1_0", "tq2_0", "q1_0", "q2_0", "i2_s", "i2_s_arm"),
                "gguf_type",
            ),
            "floats": Option(
                "of embeddings, head and full-precision layers (default: f16)",
                ("f32", "f16", "q8_0", "q6_k", "bf16"),
                "gguf_floats",
            ),
            "pre_tokenizer": Option("llama.cpp's name of the text split, if not recognized"),
        },
        is_a_stage=False,
    ),
    "pt2": Format(
        "qat.formats.pt2.writing",
        "torch without transformers",
        ".pt2",
        {"kind": Option("exported (default), or compiled by AOTInductor for this CPU", ("exported", "compiled"), "pt2_kind")},
        room=ROOM,
    ),
}
_FILES = {record.suffix: name for name, record in FORMATS.items() if record.suffix}
_NONE_OF_OURS = (".safetensors", ".onnx", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".tflite", ".mlpackage", ".zip", ".tar", ".gz")


def format_for(out: str | Path, asked: str | None = None) -> str:
    """The format's name for a target: the one that was asked for, or the one that the suffix says.

    Raises:
        ValueError: the format is not known, or the target's suffix is that of another.
    """
    suffix = Path(out).suffix
    meant = _FILES.get(suffix.lower())
    if asked is None:
        if suffix.lower() in _NONE_OF_OURS:
            raise ValueError(f"no format writes {suffix} files; known are {_known()}")
        asked = meant or next(name for name, record in FORMATS.items() if not record.suffix)
    elif asked not in FORMATS:
        raise ValueError(f"format={asked!r} is not known; choose one of {', '.join(FORMATS)}")
    if suffix != FORMATS[asked].suffix and (FORMATS[asked].suffix or meant):
        raise ValueError(f"the format {asked} is written to {FORMATS[asked].path}, not to {Path(out).name}; known are {_known()}")
    return asked


def refuse_file_name(folder: Path) -> None:
    """ValueError for a folder with the suffix of a file format, by which readers would take it for such a file."""
    if meant := _FILES.get(folder.suffix.lower()):
        raise ValueError(f"{folder} is named like a file of the format {meant}, but is to be a folder; choose another name")


def _known() -> str:
    return ", ".join(f"{name} ({record.path})" for name, record in FORMATS.items())
