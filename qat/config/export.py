"""The section `export`: what is written after training."""

from __future__ import annotations

from dataclasses import dataclass, field

from qat.config.checks import choose


@dataclass
class ExportConfig:
    """What is written after training, besides our own packed folder."""

    formats: list[str] = field(default_factory=lambda: ["hf"])
    """Formats to try; one that cannot hold the model is named under `export.skipped`."""
    layout: str = "2bit"
    """Of our own packed folder: `2bit` or `base3` (five weights a byte)."""
    linear_class: str = "bitlinear"
    """Scale convention of the Hugging Face folder: `bitlinear` or `autobitlinear`."""
    gguf_type: str = "auto"
    """Type of the quantized layers in the GGUF file; `auto` chooses by each layer's shape."""
    gguf_floats: str = "f16"
    """Type of embeddings, head and full-precision layers in the GGUF file."""

    def __post_init__(self) -> None:
        for name in self.formats:
            choose("export.formats", name, ("hf", "gguf"))
        choose("export.layout", self.layout, ("2bit", "base3"))
        choose("export.linear_class", self.linear_class, ("bitlinear", "autobitlinear"))
        choose("export.gguf_type", self.gguf_type, ("auto", "tq1_0", "tq2_0", "q1_0", "q2_0", "i2_s", "i2_s_arm"))
        choose("export.gguf_floats", self.gguf_floats, ("f32", "f16", "q8_0", "q6_k", "bf16"))
