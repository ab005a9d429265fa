"""What is derived from tensors once and kept while they live unchanged: weights as a kernel reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Derived:
    """A cache keyed by tensors' storage and by their version, so in-place changes, new tensors and freed ones are noticed."""

    def __init__(self, version: Callable[[Tensor], Any]) -> None:
        self.version = version
        self.entries: dict[tuple[Any, ...], tuple[tuple[StorageWeakRef, ...], tuple[Any, ...], Any]] = {}

    def get(self, tensors: tuple[Tensor, ...], *options: Any) -> tuple[Any, Any]:
        """The value, or None, and the slot to put one into."""
        key = (*[(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors], *options)
        versions = tuple([self.version(t) for t in tensors])
        entry = self.entries.get(key)
        if entry is not None and entry[1] == versions and self._is_of(entry[0], tensors):
            return entry[2], None
        return None, (key, tensors, versions)

    def stale(self, slot: Any) -> Any:
        """The value of the same tensors as they were before they changed, or None."""
        key, tensors, _ = slot
        entry = self.entries.get(key)
        return entry[2] if entry is not None and self._is_of(entry[0], tensors) else None

    @staticmethod
    def _is_of(refs: tuple[StorageWeakRef, ...], tensors: tuple[Tensor, ...]) -> bool:
        return all(ref.cdata == t.untyped_storage()._cdata for ref, t in zip(refs, tensors, strict=True))

    def put(self, slot: Any, value: Any) -> Any:
        """Keep the value. One of tensors not seen before makes those of freed ones forgotten: a training step, which
        puts every weight's anew, does not look through all of them for each.
        """
        key, tensors, versions = slot
        if key not in self.entries:
            for old in [k for k, (refs, *_) in list(self.entries.items()) if any(ref.expired() for ref in refs)]:
                self.entries.pop(old, None)
        self.entries[key] = tuple(StorageWeakRef(t.untyped_storage()) for t in tensors), versions, value
        return value
