"""The section `model`: which pretrained model is quantized."""

from __future__ import annotations

from dataclasses import dataclass, field

from qat.config.checks import at_least, check_types, choose


@dataclass
class ModelConfig:
    """Which pretrained model is quantized."""

    path: str = ""
    """Hub id, local folder, .gguf or glassllm .npz file, or `package://NAME/FILE` for a file inside an installed package."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    teacher: str = "shared"
    """`shared`: the same weights in full precision; `off`; or another model's path."""
    teacher_dtype: str = "float32"
    """Of the teacher's weights on the device: `float32` or `bfloat16`, half as many bytes; with `shared`, of a copy."""
    include: list[str] = field(default_factory=list)
    """Shell patterns of the linear layers to convert; empty: all but the output head and the routers."""
    exclude: list[str] = field(default_factory=list)
    """Shell patterns of layers to leave in full precision."""
    attn_implementation: str | None = None
    """How transformers computes attention, of model and teacher: `eager`, `sdpa`, `flash_attention_2`, ...; null: it decides."""
    trust_remote_code: bool = False
    """Passed to transformers."""
    start: str = "weights"
    """`weights`: train from them. `ptq`: from codes calibrated on the training text, for tiny budgets."""
    start_tokens: int = 12288
    """Tokens of the training text, in sequences spread over it, for `start=ptq` or `quant.rms_norm_start=calibrated`."""

    def __post_init__(self) -> None:
        check_types("model", self, may_be_empty=("path",))
        choose("model.teacher_dtype", self.teacher_dtype, ("float32", "bfloat16"))
        choose("model.start", self.start, ("weights", "ptq"))
        at_least("model.start_tokens", self.start_tokens, 1)
