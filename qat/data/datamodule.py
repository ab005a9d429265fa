"""One LightningDataModule for every kind of data.

What lightning 2.6 does on resume, and what is done about it here. It restores this module's state before it asks for the
loader, and its own counters (`batch_idx`, `fetched`) continue from the checkpoint; the loader must therefore yield only the
batches that are left, but keep the length of all. It warns where a loader has no `state_dict`, and never restores the position
itself. Loaders get a generator of their own, because creating an iterator otherwise draws from torch's global one, and a resumed
run would go on with other random numbers than the uninterrupted one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from qat.config import DataConfig
from qat.data.chat import Chats
from qat.data.labelled.buckets import Buckets
from qat.data.labelled.parts import Labelled
from qat.data.mixture import Mixture
from qat.data.order import Held, Shuffled, StreamBatches, Windows, counted, marked
from qat.metrics.perplexity import Window, windows
from qat.parallel import rank, size

Part = Windows | Chats | Labelled
Training = Part | Mixture


class StreamLoader(DataLoader):
    """A DataLoader over StreamBatches whose position lightning can save and restore."""

    def __init__(self, data: QATData, **arguments: Any) -> None:
        super().__init__(data.train, **arguments)
        self.data = data

    def state_dict(self) -> dict[str, int]:
        """As QATData.state_dict."""
        return self.data.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next iteration at the saved position."""
        assert isinstance(self.batch_sampler, StreamBatches)
        self.batch_sampler.start = state["sequences"]

    def __iter__(self) -> Any:
        """Batches that know how many tokens their optimizer step predicts."""
        return counted(super().__iter__(), self.data._accumulate, self.data.train.learned)


class HeldLoader(DataLoader):
    """A DataLoader over Held whose repeated batches say so."""

    def __iter__(self) -> Any:
        """See `marked`."""
        assert isinstance(self.batch_sampler, Held)
        return marked(super().__iter__(), self.batch_sampler.own)


class QATData(lightning.LightningDataModule):
    """Training batches in a resumable order, validation batches, and the held-out tokens for perplexity.

    Batches are dicts of int64 [B, L]: input_ids, labels (equal to them, -100: ignored), for chats attention_mask too; of labelled
    examples L is each batch's own, and labels are [B].
    `parts` and `names` are training's and validation's. Build it with `build_datamodule`; it is ready at once, without `setup`.
    `notes` are lines for the user: what was cut, dropped or not used, each said once.
    """

    def __init__(
        self,
        data: DataConfig,
        parts: tuple[Training, Part],
        names: tuple[str, str],
        *,
        seed: int,
        total_batches: int,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.data_config, self.seed, self.total_batches = data, seed, total_batches
        self.train: Training = parts[0]
        self.valid: Part = parts[1]
        self.names = self.name, self.eval_name = names
        self.notes = [*notes, *_notes(self.train, "training"), *_notes(self.valid, "validation")]
        self._restored = {"sequences": 0, "step": 0}

    def afresh(self) -> QATData:
        """The same data from its first batch on, for another training."""
        return QATData(self.data_config, (self.train, self.valid), self.names, seed=self.seed, total_batches=self.total_batches)

    def order(self, world: int = 1) -> Callable[[int], int]:
        """Which training sequence stands at each position of the stream, on so many devices."""
        if isinstance(self.train, Mixture):
            return self.train.order(self.seed)
        order, bucket = Shuffled(len(self.train), self.seed), self.data_config.bucket
        if isinstance(self.train, Labelled) and bucket:
            return Buckets(order, self.train.size, block=self.data_config.batch_size * world, bucket=bucket, seed=self.seed)
        return order

    @property
    def train_tokens(self) -> int:
        """Tokens in one epoch of training sequences; for chats and labelled examples without the padding."""
        if isinstance(self.train, Chats | Labelled):
            return len(self.train.tokens())
        return len(self.train) * self.train.length

    @property
    def eval_tokens(self) -> torch.Tensor:
        """All held-out tokens in order, int64 [T]; chats and labelled examples one after the other."""
        held_out = self.valid.tokens if isinstance(self.valid, Windows) else self.valid.tokens()
        return torch.from_numpy(np.asarray(held_out).astype(np.int64))

    def eval_windows(self, context: int, stride: int, batch_size: int, most: int | None = None) -> list[Window]:
        """What perplexity is measured on: windows of `eval_tokens`; of chats the assistant's turns, each after what came before.

        `most`: tokens of the text, or of the turns. Raises ValueError where there is nothing to score.
        """
        if isinstance(self.valid, Chats):
            return self.valid.windows(context, most)
        return list(windows(self.eval_tokens[:most], context, stride, batch_size))

    def train_dataloader(self) -> StreamLoader:
        """The batches that are left of `total_batches`; its length is `total_batches`."""
        # memory-mapped tokens need no worker processes, whatever lightning says on a machine with many cores
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        here, world = (rank(), size()) if self.trainer else (0, 1)
        done = self._restored["step"] * self._accumulate if self.trainer else None
        batches = StreamBatches(
            self.order(world), self.data_config.batch_size, total_batches=self.total_batches,
            start=self._restored["sequences"], done=done, rank=here, world=world,
        )  # fmt: skip
        return StreamLoader(self, batch_sampler=batches, collate_fn=self.train.collate, **self._loader_arguments())

    def val_dataloader(self) -> DataLoader:
        """This rank's share of the held-out sequences that a validation takes, in order."""
        batches = Held(len(self.valid), self.data_config.batch_size, most=self._val_batches, rank=rank(), world=size())
        return HeldLoader(self.valid, batch_sampler=batches, collate_fn=self.valid.collate, **self._loader_arguments())

    @property
    def _val_batches(self) -> int | None:
        most = self.trainer.limit_val_batches if self.trainer else None
        return most if isinstance(most, int) else None

    @property
    def _accumulate(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    def _loader_arguments(self) -> dict[str, Any]:
        return {
            "num_workers": self.data_config.workers,
            "persistent_workers": self.data_config.workers > 0,
            "generator": torch.Generator(),
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        }

    def state_dict(self) -> dict[str, int]:
        """`sequences`: how many the optimizer steps so far have used, on all devices together; `step`: those steps."""
        if self.trainer is None:
            return dict(self._restored)
        steps = self.trainer.global_step - self._restored["step"]
        used = steps * self.trainer.accumulate_grad_batches * self.data_config.batch_size * size()
        return {"sequences": self._restored["sequences"] + used, "step": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a saved position."""
        self._restored = dict(state_dict)


def _notes(part: Training, kind: str) -> list[str]:
    if isinstance(part, Labelled):
        return [f"{part.truncated} {kind} texts cut to {part.length} tokens"] if part.truncated else []
    if not isinstance(part, Chats):
        return []
    found = ((part.truncated, f"cut to {part.length} tokens"), (part.dropped, "dropped: no assistant's word within that length"))
    return [f"{count} {kind} chats {what}" for count, what in found if count]
