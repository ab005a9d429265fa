"""The section `trainer`: steps, devices, precision and what is logged."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from qat.config.checks import TOKENS, at_least, check_types, choose

MOST_THREADS = 1024


@dataclass
class TrainerConfig:
    """The keys of lightning's Trainer that a user may set, typed, and a few of ours."""

    max_steps: int = 1000
    """Optimizer steps."""
    max_tokens: int | None = None
    """In place of max_steps: tokens to train on; the steps follow from it. On the command line one of the three may be given."""
    max_epochs: float | None = None
    """In place of max_steps: passes over the training sequences; the steps follow from it."""
    accelerator: str = "auto"
    """`cpu`, `gpu` or `auto`."""
    devices: int = 1
    """Devices on each node."""
    num_nodes: int = 1
    """Nodes."""
    strategy: str = "auto"
    """How several devices share the work: `ddp`, each holds the model; `fsdp2`, each holds a shard of it; `auto`: ddp."""
    gather: str = "auto"
    """How latent weights travel with fsdp2: `codes` of 2 bits, equal to the bit; `float32`; `auto`: codes, where layers can."""
    precision: str = "32-true"
    """`32-true`, `bf16-mixed` or `16-mixed` (CUDA only). Latent weights and optimizer state are float32 in each."""
    accumulate_grad_batches: int = 1
    """Batches an optimizer step."""
    gradient_sums: str = "float32"
    """How gradients of an update's batches are added: `float32`; `float64`, equal to the bit on any number of devices."""
    gradient_clip_val: float | None = 1.0
    """Largest gradient norm; null: no clipping."""
    val_every: int | None = None
    """Optimizer steps between validations; the last step has one in any case; null: none while training."""
    val_batches: int = 16
    """Batches of a validation while training."""
    checkpoint_every: int | None = None
    """Optimizer steps between checkpoints; null: only by minutes, at the end, and when interrupted."""
    checkpoint_minutes: float | None = 10.0
    """Minutes between checkpoints, so that a kill loses no more; null: only by steps, at the end, and when interrupted."""
    log_every_n_steps: int = 10
    """Steps between rows of metrics.csv."""
    monitor_every: int | None = 50
    """Steps between looks at the quantized layers, for flips, scales, inputs and alarms; null: no looks, and no alarms."""
    samples: int = 2
    """Texts generated at each validation; 0: none."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the student."""
    graph: bool = False
    """Replay steps that write nothing as one CUDA graph: a GPU then waits for no Python. Batches of one shape, one device."""
    threads: int | None = None
    """torch's CPU threads; null: torch decides."""
    progress: bool = True
    """Show the progress: a bar in a terminal, some lines elsewhere."""

    def __post_init__(self) -> None:
        check_types("trainer", self)
        _check_strategy(self.strategy)
        choose("trainer.gather", self.gather, ("auto", "float32", "codes"))
        if self.gather != "auto" and self.strategy != "fsdp2":
            raise ValueError(
                f"trainer.gather={self.gather} needs trainer.strategy=fsdp2, not {self.strategy}: nothing else gathers weights;"
                " use trainer.gather=auto"
            )
        choose("trainer.gradient_sums", self.gradient_sums, ("float32", "float64"))
        _check_undone(self)
        choose("trainer.accelerator", self.accelerator, ("cpu", "gpu", "auto"))
        if self.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision={self.precision} would keep the latent weights in 16 bits, where most steps of an optimizer"
                " round to nothing and codes freeze; use bf16-mixed, whose matmuls are as fast"
            )
        choose("trainer.precision", self.precision, ("32-true", "bf16-mixed", "16-mixed"))
        for key in ("max_steps", "devices", "num_nodes", "accumulate_grad_batches", "log_every_n_steps", "val_batches"):
            at_least(f"trainer.{key}", getattr(self, key), 1)
        at_least("trainer.max_tokens", self.max_tokens, 1, most=TOKENS)
        at_least("trainer.max_epochs", self.max_epochs, 0, open_end=True, most=1e9)
        if self.max_tokens is not None and self.max_epochs is not None:
            said = f"trainer.max_tokens={self.max_tokens}, trainer.max_epochs={self.max_epochs:g}"
            raise ValueError(f"{said}: a budget is in steps, tokens or epochs; set one of them to null")
        for key in ("val_every", "checkpoint_every", "monitor_every"):
            at_least(f"trainer.{key}", getattr(self, key), 1)
        at_least("trainer.checkpoint_minutes", self.checkpoint_minutes, 0, open_end=True, most=1e6)
        at_least("trainer.threads", self.threads, 1, most=MOST_THREADS)
        at_least("trainer.samples", self.samples, 0, most=10_000)
        at_least("trainer.gradient_clip_val", self.gradient_clip_val, 0, open_end=True, most=1e30)


def _check_strategy(name: str) -> None:
    """Each that lightning has beside ours is refused with what to use."""
    instead = next((use for other, use in INSTEAD.items() if name.startswith(other)), None)
    if name not in ("auto", "ddp", "fsdp2") and instead is not None:
        raise ValueError(f"trainer.strategy={name} is not allowed; use {instead}. Allowed are auto, ddp, fsdp2")
    choose("trainer.strategy", name, ("auto", "ddp", "fsdp2"))


def _check_undone(trainer: TrainerConfig) -> None:
    """lightning divides a loss by the batches of an update, which is taken back: to the bit for most numbers, and up to 40."""
    batches = trainer.accumulate_grad_batches
    if trainer.gradient_sums == "float64" and not _is_undone(batches):
        near = [next(n for n in range(batches, batches + way * 100, way) if _is_undone(n)) for way in (-1, 1)]
        raise ValueError(
            f"trainer.gradient_sums=float64 cannot be to the bit with trainer.accumulate_grad_batches={batches}: in float32"
            f" {batches} times 1/{batches} is not 1; use {near[0]} or {near[1]}"
        )


def _is_undone(batches: int) -> bool:
    return batches < 1 or _float32(_float32(1 / batches) * batches) == 1


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


_DATA_PARALLEL = "ddp, which finds unused parameters by itself and starts a process for each device"
INSTEAD = {
    "ddp": _DATA_PARALLEL,
    "dp": _DATA_PARALLEL,
    "fsdp": "fsdp2: its predecessor flattens weights, which quantizers need whole, and knows no CPU",
    "model_parallel": "fsdp2, which is lightning's ModelParallelStrategy with a plan for the model",
    "deepspeed": "fsdp2, which shards weights, gradients and optimizer state as its stage 3 does",
    "single_device": "auto with trainer.devices=1",
    "xla": "auto: runs compute on CPUs and CUDA GPUs",
    "hpu": "auto: runs compute on CPUs and CUDA GPUs",
}
"""How a strategy's name begins -> what to use in place of it."""
