"""Cross-entropy and divergence of a few rows at a time: the values and gradients of all at once, without their memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qat.config import DistillConfig
from qat.losses import LOSSES
from qat.losses.chunked import cross_entropy_and_kl
from qat.losses.logits import predicted, predicting
from qat.losses.record import Seen


def seen(logits: Tensor, teacher: Tensor, labels: Tensor) -> Seen:
    outputs = [SimpleNamespace(logits=one) for one in (logits, teacher)]
    return Seen(*predicted(logits, labels), predicting(labels), predicted(teacher, labels)[0], *outputs)


def given(masked: bool) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(0, 9, (2, 6))
    if masked:
        labels[0, :4] = -100
    return torch.randn(2, 6, 9), torch.randn(2, 6, 9), labels


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_values_and_gradients_are_those_of_all_at_once(masked: bool, temperature: float, chunk: int) -> None:
    logits, teacher, labels = given(masked)
    found = []
    for kl_chunk in (None, chunk):
        leaf = logits.clone().requires_grad_()
        distill = DistillConfig(kl=1.0, temperature=temperature, kl_chunk=kl_chunk)
        batch = seen(leaf, teacher, labels)
        (ce, count), (kl, again) = (LOSSES[name].function(batch, distill) for name in ("ce", "kl"))
        (0.3 * ce + 0.7 * kl).backward()
        assert count == again == (7 if masked else 10) and leaf.grad is not None
        found.append((ce, kl, leaf.grad))
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole)
    assert found[0][1] > 0.1


def test_gradients_of_one_term_alone() -> None:
    logits, teacher, _ = given(False)
    index, targets = torch.arange(5), torch.arange(5)
    leaf = logits[0].double().requires_grad_()
    for number in (0, 1):
        expected = torch.autograd.grad(_naive(leaf[:5], teacher[0, :5].double(), targets)[number], leaf)[0]
        term = cross_entropy_and_kl(leaf, teacher[0].double(), index, targets, 1.0, 2)[number]
        torch.testing.assert_close(torch.autograd.grad(term, leaf)[0], expected, rtol=1e-5, atol=1e-6)


def _naive(rows: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    p, q = teacher.softmax(-1), rows.softmax(-1)
    return -q[torch.arange(5), targets].log().sum(), (p * (p / q).log()).sum()


def test_without_a_teacher_and_without_tokens() -> None:
    logits = torch.randn(4, 9, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    ce, kl = cross_entropy_and_kl(logits, None, none, none, 1.0, 3)
    (ce + kl).backward()
    assert ce.item() == kl.item() == 0.0 and logits.grad is not None and not bool(logits.grad.any())


def test_a_term_that_is_only_measured_leaves_the_other_its_gradient() -> None:
    for kl_chunk in (None, 4):
        logits, teacher, labels = given(True)
        batch, distill = seen(logits.requires_grad_(), teacher, labels), DistillConfig(ce=0.0, kl=1.0, kl_chunk=kl_chunk)
        with torch.no_grad():
            LOSSES["ce"].function(batch, distill)
        LOSSES["kl"].function(batch, distill)[0].backward()
        assert logits.grad is not None and bool(logits.grad.any())


class Largest(TorchDispatchMode):
    """Bytes of the tensors that operations made, each storage once, those known before left out."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known, self.made = {x.untyped_storage().data_ptr() for x in known}, list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.made.append(x.untyped_storage().nbytes())
        return output


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_memory_is_a_chunk_s_and_one_gradient(temperature: float) -> None:
    tokens, words, chunk = 64, 128, 4
    logits, teacher = torch.randn(tokens, words).bfloat16().requires_grad_(), torch.randn(tokens, words).bfloat16()
    index = targets = torch.arange(tokens - 1)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with Largest(logits, teacher) as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ce, kl = cross_entropy_and_kl(logits, teacher, index, targets, temperature, chunk)
    assert sum(kept.values()) == 2 * tokens * words * 2 + (tokens - 1) * 8  # both logits, as they are, and the positions
    assert max(forward.made) == chunk * words * 4
    with Largest(logits, teacher) as backward:
        torch.autograd.backward(ce + kl)
    large = [size for size in backward.made if size > chunk * words * 4]
    assert set(large) == {tokens * words * 2}  # the gradient, in the logits' own type
