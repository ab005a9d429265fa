"""Every configuration of ours: typed dataclasses, their checks, and `register()` for Hydra.

Standard library only, so that `qat.QuantConfig` costs nothing to import. The classes are not frozen
because Hydra cannot compose frozen ones; `__post_init__` checks values after composition, and every
message names the key, the value and what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def _choose(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed or isinstance(value, float):  # 2.0 is equal to 2
        raise ValueError(f"{key}={value!r} is not allowed; choose one of {', '.join(map(str, allowed))}")


def _at_least(key: str, value: float | None, least: float, *, open_end: bool = False) -> None:
    if value is None:
        return
    if not (value > least if open_end else value >= least):  # also catches NaN
        raise ValueError(f"{key}={value!r} is not allowed; it must be {'above' if open_end else 'at least'} {least}")


def _fraction(key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{key}={value!r} is not allowed; it must be at least 0 and below 1")


@dataclass
class QuantConfig:
    """How a linear layer is quantized. The default is BitNet b1.58 (arXiv:2402.17764)."""

    weight: str = "ternary"
    """`ternary` {-1, 0, 1} or `binary` {-1, 1}."""
    scale: str = "absmean"
    """What the weight scale is: `absmean`, `absmax` (codes change at half of it), `absmedian`. Binary: `absmean` only."""
    granularity: str = "tensor"
    """One scale a `tensor`, an output `channel`, or a `group` of `group_size` weights along the input."""
    group_size: int | None = None
    """Weights a group; must divide the layer's `in_features`. Only with `granularity=group`."""
    components: int = 1
    """Ternary matrices a weight is the sum of, up to 4: 2 have 9 levels in twice the bits. Their fit slows training steps."""
    act_bits: int | None = 8
    """8: activations are quantized to int8. null: they stay in floating point."""
    act_granularity: str = "token"
    """One activation scale a `token` (last dimension) or one for the whole `tensor`."""
    scale_dtype: str = "float32"
    """The weight scale is rounded to this dtype, so that training uses the value as it will be stored."""
    eps: float = 1e-5
    """Lower bound of every scale."""
    rms_norm_eps: float | None = None
    """An RMSNorm with this epsilon for each layer's own input (SubLN). null: none. New ones make a pretrained model relearn."""
    kernels: str = "auto"
    """`auto` takes compiled kernels where they exist, `compiled` insists on them, `reference` is pure torch."""
    backward: str = "input"
    """The backward matmuls' precision: `input` is the gradient's own; `bf16` and `int8` are faster and less exact."""

    def __post_init__(self) -> None:
        _choose("quant.weight", self.weight, ("ternary", "binary"))
        _choose("quant.scale", self.scale, ("absmean", "absmax", "absmedian"))
        _choose("quant.granularity", self.granularity, ("tensor", "channel", "group"))
        _choose("quant.act_bits", self.act_bits, (8, None))
        _choose("quant.act_granularity", self.act_granularity, ("token", "tensor"))
        _choose("quant.scale_dtype", self.scale_dtype, ("float32", "bfloat16", "float16"))
        _choose("quant.kernels", self.kernels, ("auto", "compiled", "reference"))
        _choose("quant.backward", self.backward, ("input", "bf16", "int8"))
        _at_least("quant.eps", self.eps, 0, open_end=True)
        _choose("quant.components", self.components, (1, 2, 3, 4))
        _at_least("quant.rms_norm_eps", self.rms_norm_eps, 0, open_end=True)
        if self.act_bits is None and self.backward != "input":
            raise ValueError(f"quant.backward={self.backward} needs int8 activations (quant.act_bits=8), not quant.act_bits=null")
        if self.act_bits is None and self.kernels == "compiled":
            raise ValueError("quant.kernels=compiled needs quant.act_bits=8; float activations have no compiled kernels")
        if self.backward == "int8" and self.granularity == "group":
            raise ValueError("quant.backward=int8 does not fit quant.granularity=group; choose another granularity, or bf16")
        if self.components > 1:
            self._check_components()
        if self.weight == "binary" and self.scale != "absmean":
            raise ValueError(f"quant.scale={self.scale!r} does not fit quant.weight=binary; only absmean does")
        if self.granularity == "group":
            if self.group_size is None:
                raise ValueError("quant.group_size is missing; quant.granularity=group needs it, for example 64")
            _at_least("quant.group_size", self.group_size, 1)
        elif self.group_size is not None:
            raise ValueError(f"quant.group_size={self.group_size} needs quant.granularity=group, not {self.granularity}")

    @property
    def words(self) -> str:
        """How weights are quantized, for people."""
        group = f" of {self.group_size}" if self.group_size else ""
        what = f"{self.weight} {self.scale}" if self.components == 1 else f"{self.components} ternary components, least squares"
        return f"{what} per {self.granularity}{group}"

    def _check_components(self) -> None:
        wrong = {"weight": self.weight != "ternary", "scale": self.scale != "absmean", "backward": self.backward == "int8"}
        for key in (key for key, found in wrong.items() if found):
            why = "components are ternary, their scales are fitted, and their gradients input or bf16"
            raise ValueError(f"quant.{key}={getattr(self, key)} does not fit quant.components={self.components}: {why}")


@dataclass
class ModelConfig:
    """Which pretrained model is quantized."""

    path: str = ""
    """Hub id, local folder, .gguf or glassllm .npz file, or `package://NAME/FILE` for a file inside an installed package."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    teacher: str = "shared"
    """`shared`: the same weights in full precision; `off`; or another model's path."""
    include: list[str] = field(default_factory=list)
    """Shell patterns of the linear layers to convert; empty: all but the output head and the routers."""
    exclude: list[str] = field(default_factory=list)
    """Shell patterns of layers to leave in full precision."""
    trust_remote_code: bool = False
    """Passed to transformers."""


@dataclass
class SelfgenConfig:
    """Training text sampled from the full-precision model itself (data-free)."""

    tokens: int = 500_000
    """How many tokens to sample."""
    valid_tokens: int = 32_768
    """How many more to sample for validation, with other random numbers."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_k: int | None = None
    """Sample among the k likeliest tokens; null: all."""
    batch_size: int = 256
    """Sequences sampled at once."""

    def __post_init__(self) -> None:
        _at_least("data.selfgen.tokens", self.tokens, 1)
        _at_least("data.selfgen.valid_tokens", self.valid_tokens, 1)
        _at_least("data.selfgen.temperature", self.temperature, 0, open_end=True)
        _at_least("data.selfgen.top_k", self.top_k, 1)
        _at_least("data.selfgen.batch_size", self.batch_size, 1)


@dataclass
class DataConfig:
    """Where the training and the evaluation text comes from, and how it is cut."""

    kind: str = "text"
    """`text`: documents packed to length; `chat`: `messages`, loss on the assistant only; `selfgen`: the teacher's samples."""
    train: str | None = None
    """A .txt, .jsonl or .parquet file, or the name of a hub data set. Not for selfgen."""
    valid: str | None = None
    """The same for validation; null: the last `valid_fraction` of the training text."""
    valid_fraction: float = 0.05
    """The share of the training text held out when `valid` is null."""
    train_split: str = "train"
    """Split of a hub data set; `name/config:split` in `train` is not parsed."""
    valid_split: str = "validation"
    """Split for `valid`, when that is a hub data set."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    text_field: str = "text"
    """Field of a .jsonl, .parquet or hub record that holds the text."""
    messages_field: str = "messages"
    """Field that holds a chat's list of {role, content}."""
    max_tokens: int | None = None
    """Stop reading the training text after so many tokens; null: read all."""
    sequence_length: int = 512
    """Tokens a sequence."""
    batch_size: int = 8
    """Sequences a batch on each device."""
    workers: int = 0
    """Loader processes."""
    cache_dir: str | None = None
    """Folder of the tokenized cache; null: $QAT_CACHE or ~/.cache/qat."""
    selfgen: SelfgenConfig = field(default_factory=SelfgenConfig)

    def __post_init__(self) -> None:
        _choose("data.kind", self.kind, ("text", "chat", "selfgen"))
        _fraction("data.valid_fraction", self.valid_fraction)
        _at_least("data.sequence_length", self.sequence_length, 2)
        _at_least("data.batch_size", self.batch_size, 1)
        _at_least("data.max_tokens", self.max_tokens, 1)
        _at_least("data.workers", self.workers, 0)
        if self.kind == "selfgen" and (self.train or self.valid):
            key = "train" if self.train else "valid"
            raise ValueError(f"data.{key}={getattr(self, key)!r} does not fit data=selfgen, which samples its own; use data=text")
        if self.kind != "selfgen" and self.valid is None and self.valid_fraction == 0:
            raise ValueError("data.valid_fraction=0 leaves nothing to evaluate on; give data.valid or a fraction above 0")


@dataclass
class DistillConfig:
    """The loss: ce * cross-entropy + kl * tau^2 * KL(teacher || student) (Hinton et al., arXiv:1503.02531, section 2)."""

    ce: float = 1.0
    """Weight of the cross-entropy with the text."""
    kl: float = 0.0
    """Weight of the divergence from the teacher's distribution."""
    temperature: float = 1.0
    """tau of the divergence."""

    def __post_init__(self) -> None:
        _at_least("distill.ce", self.ce, 0)
        _at_least("distill.kl", self.kl, 0)
        _at_least("distill.temperature", self.temperature, 0, open_end=True)
        if self.ce == 0 and self.kl == 0:
            raise ValueError("distill.ce=0 and distill.kl=0 leave no loss; set one above 0")


@dataclass
class OptimConfig:
    """Optimizer, learning rates and schedules."""

    optimizer: dict[str, Any] = field(default_factory=lambda: {"_target_": "torch.optim.AdamW", "betas": [0.9, 0.95]})
    """A `_target_` and its arguments; parameters, lr and weight_decay are passed to it."""
    lr: float = 1e-3
    """Peak learning rate of everything but the latent weights."""
    latent_lr_multiplier: float = 1.0
    """Times lr: the peak learning rate of the latent weights of BitLinear layers."""
    weight_decay: float = 0.0
    """On latent weights and other matrices, never on norms, biases and scales."""
    schedule: str = "cosine"
    """`cosine`, `linear`, `constant`, or `two_stage` (linear; half way the rate drops by a third, weight decay to 0)."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0."""
    final_lr_fraction: float = 0.0
    """The rate at the last step as a share of the peak (cosine and linear)."""
    lambda_steps: int = 0
    """Steps over which quantization is blended in, W + lambda (Q(W) - W) with lambda 0 -> 1; 0: at once."""

    def __post_init__(self) -> None:
        if "_target_" not in self.optimizer:
            raise ValueError("optim.optimizer needs a _target_, for example torch.optim.AdamW")
        _choose("optim.schedule", self.schedule, ("cosine", "linear", "constant", "two_stage"))
        _at_least("optim.lr", self.lr, 0, open_end=True)
        _at_least("optim.latent_lr_multiplier", self.latent_lr_multiplier, 0)
        _at_least("optim.weight_decay", self.weight_decay, 0)
        _at_least("optim.warmup_steps", self.warmup_steps, 0)
        _at_least("optim.lambda_steps", self.lambda_steps, 0)
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError(f"optim.final_lr_fraction={self.final_lr_fraction!r} is not allowed; it must be in 0 to 1")


@dataclass
class TrainerConfig:
    """The keys of lightning's Trainer that a user may set, typed, and a few of ours."""

    max_steps: int = 1000
    """Optimizer steps."""
    accelerator: str = "auto"
    """`cpu`, `gpu` or `auto`."""
    devices: int = 1
    """Devices on each node."""
    num_nodes: int = 1
    """Nodes."""
    strategy: str = "auto"
    """lightning's strategy: `auto`, `ddp`, `fsdp`, ..."""
    precision: str = "32-true"
    """`32-true`, `bf16-mixed` or `16-mixed` (CUDA only). Latent weights and optimizer state are float32 in each."""
    accumulate_grad_batches: int = 1
    """Batches an optimizer step."""
    gradient_clip_val: float | None = 1.0
    """Largest gradient norm; null: no clipping."""
    val_every: int | None = None
    """Optimizer steps between validations; null: none while training."""
    val_batches: int = 16
    """Batches of a validation while training."""
    checkpoint_every: int | None = None
    """Optimizer steps between checkpoints; null: only at the end, and when interrupted."""
    log_every_n_steps: int = 10
    """Steps between rows of metrics.csv."""
    samples: int = 2
    """Texts generated at each validation; 0: none."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the student."""
    threads: int | None = None
    """torch's CPU threads; null: torch decides."""
    progress: bool = True
    """Show the progress: a bar in a terminal, some lines elsewhere."""

    def __post_init__(self) -> None:
        _choose("trainer.accelerator", self.accelerator, ("cpu", "gpu", "auto"))
        _choose("trainer.precision", self.precision, ("32-true", "bf16-mixed", "16-mixed"))
        for key in ("max_steps", "devices", "num_nodes", "accumulate_grad_batches", "log_every_n_steps", "val_batches"):
            _at_least(f"trainer.{key}", getattr(self, key), 1)
        for key in ("val_every", "checkpoint_every", "threads"):
            _at_least(f"trainer.{key}", getattr(self, key), 1)
        _at_least("trainer.samples", self.samples, 0)
        _at_least("trainer.gradient_clip_val", self.gradient_clip_val, 0, open_end=True)


@dataclass
class EvalConfig:
    """How perplexity is measured."""

    context: int | None = None
    """Tokens a window; null: data.sequence_length."""
    stride: int | None = None
    """Tokens by which the window moves; null: the context, so that windows do not overlap."""
    batch_size: int = 8
    """Windows at once."""
    max_tokens: int | None = 65_536
    """Evaluate the first so many tokens; null: all."""
    texts: dict[str, str] = field(default_factory=dict)
    """Further texts, name -> file or `pydoc_data.topics` (English text that ships with Python)."""

    def __post_init__(self) -> None:
        _at_least("eval.context", self.context, 2)
        _at_least("eval.stride", self.stride, 1)
        _at_least("eval.batch_size", self.batch_size, 1)
        _at_least("eval.max_tokens", self.max_tokens, 2)
        if self.context and self.stride and self.stride > self.context:
            raise ValueError(f"eval.stride={self.stride} is above eval.context={self.context}, so tokens would be left out")


@dataclass
class ControlConfig:
    """The honest comparison: the full-precision model fine-tuned by cross-entropy on the same tokens."""

    enabled: bool = False
    """Train it after the quantized model."""
    lr: float = 1e-4
    """Its own peak learning rate."""

    def __post_init__(self) -> None:
        _at_least("control.lr", self.lr, 0, open_end=True)


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
            _choose("export.formats", name, ("hf", "gguf"))
        _choose("export.layout", self.layout, ("2bit", "base3"))
        _choose("export.linear_class", self.linear_class, ("bitlinear", "autobitlinear"))
        _choose("export.gguf_type", self.gguf_type, ("auto", "tq1_0", "tq2_0", "q1_0", "q2_0", "i2_s", "i2_s_arm"))
        _choose("export.gguf_floats", self.gguf_floats, ("f32", "f16", "q8_0", "q6_k", "bf16"))


@dataclass
class RunConfig:
    """Where a run is written."""

    name: str = "run"
    """Name of the run; the recipe's by default."""
    dir: str | None = None
    """Its folder; null: runs/<name>/<time>."""

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or Path(self.name).name != self.name:
            raise ValueError(f"run.name={self.name!r} is not allowed; it must be a plain name, without folders (use run.dir)")


@dataclass
class TrainConfig:
    """All that `qat.train.run` needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    data: DataConfig = field(default_factory=DataConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Further lightning callbacks, name -> `_target_` and its arguments."""
    logger: dict[str, Any] = field(default_factory=dict)
    """Further lightning loggers, name -> `_target_` and its arguments; metrics.csv is always written."""
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 0
    """Seeds python, numpy, torch, the order of the data and selfgen."""
    resume: str | None = None
    """Folder of a run to continue."""
    dry_run: bool = False
    """Load, convert, print coverage, memory and tokens, and stop."""

    def check(self) -> None:
        """Raise ValueError where sections contradict each other or a value that a run needs is missing."""
        if not self.model.path:
            raise ValueError(
                "model.path is missing; give a hub id, a folder, a .gguf file, or a recipe that has one (recipe=NAME)"
            )
        if self.distill.kl > 0 and self.model.teacher == "off":
            raise ValueError(f"distill.kl={self.distill.kl} needs a teacher, but model.teacher=off; set one of them")
        if self.optim.lambda_steps > self.trainer.max_steps:
            raise ValueError(
                f"optim.lambda_steps={self.optim.lambda_steps} is above trainer.max_steps={self.trainer.max_steps},"
                " so training would end before the model is quantized"
            )
        for key in ("train", "valid"):
            name = getattr(self.data, key)
            if name and Path(name).suffix in (".txt", ".jsonl", ".parquet") and not Path(name).expanduser().is_file():
                raise ValueError(f"data.{key}={name!r}: there is no such file")
        if self.data.kind != "selfgen" and not self.data.train:
            raise ValueError(
                f"data.train is missing; data={self.data.kind} needs a .txt, .jsonl or .parquet file or a hub data set"
            )


def config_folder(name: str) -> Path:
    """The folder `conf` or `recipes`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise ValueError(f"the folder {name!r} is missing beside {package}; the installation is incomplete")


def register() -> None:
    """Give Hydra the schema and, as members of the group `recipe`, every file of recipes/.

    A search path cannot do it: Hydra names a group after its folder, and such groups are missing from `--help`.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    store.store(name="schema", node=TrainConfig)
    for file in sorted(config_folder("recipes").glob("*.yaml")):
        store.store(group="recipe", name=file.stem, node=OmegaConf.load(file), package="_global_")


def check_keys(arguments: list[str]) -> None:
    """Raise ValueError for an override `a.b=value` whose key does not exist, naming the nearest ones.

    Hydra's own message names neither. Keys below `callbacks`, `logger` and `optim.optimizer` are free, and so are Hydra's.
    """
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        key = key.lstrip("+~")
        if equals and key.replace(".", "").replace("_", "").isalnum() and not key.startswith(("hydra.", "recipe")):
            _check_key(key)


def _check_key(key: str) -> None:
    node: Any = TrainConfig()
    walked: list[str] = []
    for part in key.split("."):
        if isinstance(node, dict):
            return
        names = [f.name for f in fields(node)] if is_dataclass(node) else []
        if part not in names:
            where = ".".join(walked)
            near = get_close_matches(part, names, n=1)
            hint = f"; did you mean {'.'.join([*walked, near[0]])}" if near else ""
            allowed = ", ".join([*names, "recipe"] if not walked else names)
            raise ValueError(f"there is no key {key!r}{hint}. Allowed{f' in {where}' if where else ''}: {allowed}")
        node = getattr(node, part)
        walked.append(part)


def options() -> dict[str, list[str]]:
    """Group -> the names that may be chosen in it, recipes first; read from the file names alone."""
    groups = {"recipe": sorted(file.stem for file in config_folder("recipes").glob("*.yaml"))}
    for folder in sorted(config_folder("conf").iterdir()):
        if folder.is_dir() and (names := sorted(file.stem for file in folder.glob("*.yaml"))):
            groups[folder.name] = names
    return groups
