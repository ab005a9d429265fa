"""What is kept of tensors is theirs: as they are now, and no longer than they live."""

from __future__ import annotations

import torch

from qat.ops.derived import Derived


def kept(cache: Derived, tensor: torch.Tensor) -> object:
    """What the cache has of it, or what it puts there: its sum."""
    found, slot = cache.get((tensor,))
    return found if found is not None else cache.put(slot, tensor.sum().item())


def test_a_value_is_found_until_its_tensor_changes():
    cache, tensor = Derived(lambda t: t._version), torch.ones(3)
    assert kept(cache, tensor) == 3 and cache.get((tensor,)) == (3, None)
    assert cache.get((tensor[1:],))[0] is None and cache.get((tensor,), "another option")[0] is None
    tensor.add_(1)
    found, slot = cache.get((tensor,))
    assert found is None and cache.stale(slot) == 3
    assert kept(cache, tensor) == 6 and len(cache.entries) == 1


def test_another_tensor_in_the_same_memory_is_another():
    cache, memory = Derived(lambda t: 0), torch.ones(4)
    kept(cache, memory[:2])
    other = torch.frombuffer(memory.numpy(), dtype=torch.float32, count=2)
    assert other.data_ptr() == memory.data_ptr()
    found, slot = cache.get((other,))
    assert found is None and cache.stale(slot) is None


def test_values_of_freed_tensors_are_forgotten_with_the_next_new_one():
    cache, tensors = Derived(lambda t: t._version), [torch.full((2,), float(i)) for i in range(5)]
    for tensor in tensors:
        kept(cache, tensor)
    last = tensors.pop()
    tensors.clear()
    kept(cache, last.add_(1))
    new = torch.zeros(1000)
    kept(cache, new)
    assert [value for _, _, value in cache.entries.values()] == [10.0, 0.0]
