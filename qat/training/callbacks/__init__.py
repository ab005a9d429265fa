"""lightning callbacks, one a file."""

from qat.training.callbacks.anneal import Anneal
from qat.training.callbacks.checkpoint import Checkpoint
from qat.training.callbacks.guard import NonFiniteError, NonFiniteGuard
from qat.training.callbacks.oscillation import Oscillation
from qat.training.callbacks.progress import progress
from qat.training.callbacks.rng import RandomState
from qat.training.callbacks.samples import Samples
from qat.training.callbacks.stopping import StopAtStep
from qat.training.callbacks.throughput import Throughput
from qat.training.callbacks.warmup import LambdaWarmup, NormWarmup

__all__ = [
    "Anneal",
    "Checkpoint",
    "LambdaWarmup",
    "NonFiniteError",
    "NonFiniteGuard",
    "NormWarmup",
    "Oscillation",
    "RandomState",
    "Samples",
    "StopAtStep",
    "Throughput",
    "progress",
]
