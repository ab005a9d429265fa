"""The section `export`: what is written after training."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from qat.config.checks import check_types, choose
from qat.quantizers.layouts import LAYOUTS
from qat.targets import FLOATS, FORMATS

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class ExportConfig:
    """What is written after training, besides our own packed folder."""

    formats: list[str] = field(default_factory=lambda: ["hf"])
    """Formats to try, of `hf` (a folder), `gguf` and `pt2`; one that cannot hold the model is named in the result's `skipped`."""
    checkpoint: str = "last"
    """Weights that are packed: `last`, or `best`, of the checkpoint that a ModelCheckpoint found best (callbacks=best)."""
    layout: str = "2bit"
    """Of our own packed folder: `2bit`, `base3` (five weights a byte), or `sparse` (one zero in four: 1.25 bits, for sherry)."""
    floats: str = "source"
    """Dtype in which folders keep what is not quantized: `source` (the pretrained model's), `float32`, `bfloat16`, `float16`."""
    linear_class: str = "bitlinear"
    """Scale convention of the Hugging Face folder: `bitlinear` or `autobitlinear`."""
    gguf_type: str = "auto"
    """Type of the quantized layers in the GGUF file; `auto` chooses by each layer's shape."""
    gguf_floats: str = "f16"
    """Type of embeddings, head and full-precision layers in the GGUF file."""

    pt2_kind: str = "exported"
    """Kind of the .pt2 file: `exported`, or `compiled` for this machine's CPU (needs g++)."""

    push_to_hub: str | None = None
    """USER/NAME on the hub, to push all that was written to at the end, with a model card; refused at the start if it cannot."""
    hub_private: bool | None = None
    """Whether a repository that is made there is private; null: as the account has it."""

    def __post_init__(self) -> None:
        check_types("export", self)
        if self.push_to_hub is not None and not _REPOSITORY.fullmatch(self.push_to_hub):
            raise ValueError(f"export.push_to_hub={self.push_to_hub!r} is not allowed; it must be USER/NAME")
        choose("export.checkpoint", self.checkpoint, ("last", "best"))
        choose("export.layout", self.layout, tuple(LAYOUTS))
        choose("export.floats", self.floats, FLOATS)
        for name in self.formats:
            choose("export.formats", name, tuple(FORMATS))
        for record in FORMATS.values():
            for option in record.options.values():
                if option.setting and option.allowed:
                    choose(f"export.{option.setting}", getattr(self, option.setting), option.allowed)
