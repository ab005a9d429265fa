"""lightning callbacks, one a file."""

from qat.callbacks.checkpoint import Checkpoint
from qat.callbacks.guard import NonFiniteError, NonFiniteGuard
from qat.callbacks.interrupt import GracefulInterrupt
from qat.callbacks.progress import progress
from qat.callbacks.rng import RandomState
from qat.callbacks.samples import Samples
from qat.callbacks.throughput import Throughput
from qat.callbacks.warmup import LambdaWarmup

__all__ = [
    "Checkpoint",
    "GracefulInterrupt",
    "LambdaWarmup",
    "NonFiniteError",
    "NonFiniteGuard",
    "RandomState",
    "Samples",
    "Throughput",
    "progress",
]
