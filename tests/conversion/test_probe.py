"""The probe: what one batch shows of a model's layers, and that it leaves the model as it was."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from tiny import Pair, X, outcome
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qat
from qat import Conversion, PackedBitLinear
from qat.conversion.probe import NO_GRADIENT, NOT_CALLED

READERS: dict[str, Callable[[Pair, Tensor], Tensor]] = {
    "functional": lambda m, h: nn.functional.linear(h, m.second.weight, m.second.bias),
    "transposed": lambda m, h: h @ m.second.weight.t(),
    "an alias": lambda m, h: h @ m.second.weight.data[:, :8] + m.second(h)[:, :8],
    "beside a call": lambda m, h: m.second(h) + m.second.weight.norm(),
    "in a list": lambda m, h: h @ torch.cat([m.second.weight, m.first.weight[:0]]),
    "the class's forward": lambda m, h: nn.Linear.forward(m.second, h),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_weight_that_someone_else_reads_stays(kind: str) -> None:
    if kind == "in a list":  # which reads the other layer's weight, too
        record = qat.convert(nn.Sequential(Pair(READERS[kind]), nn.Linear(32, 32)), probe=X)
        assert record.converted == ["1"] and "is read outside its own forward" in record.skipped["0.second"]
        return
    reason = outcome(READERS[kind])
    assert reason is not None and reason.startswith("its weight is read outside its own forward, by <lambda>, where")
    assert outcome(READERS[kind], include=["first", "second"]) == reason  # naming it does not make it right


def test_a_helper_and_a_grandparent_are_named() -> None:
    class Helper(Pair):
        def helper(self, h: Tensor) -> Tensor:
            return nn.functional.linear(h, self.second.weight)

    class Grandparent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 32)))

        def forward(self, x: Tensor) -> Tensor:
            return self.child[0](x) @ self.child[1][0].weight

    helper = Helper(lambda m, h: h)
    assert "by test_a_helper_and_a_grandparent_are_named.Helper.helper," in qat.convert(helper, probe=X).skipped["second"]
    y = helper(X)
    qat.pack(helper)
    assert torch.equal(helper(X), y) and y.isfinite().all()
    assert "Grandparent.forward" in qat.convert(Grandparent(), probe=X).skipped["child.1.0"]


CALLS: dict[str, Callable[[Pair, Tensor], Tensor]] = {
    "plain": lambda m, h: m.second(h),
    "its forward": lambda m, h: m.second.forward(h),
    "a checkpoint": lambda m, h: checkpoint(m.second, h, use_reentrant=False),
    "asked for its dtype": lambda m, h: m.second(h.to(m.second.weight.dtype).to(m.second.weight)),
    "asked for its shape": lambda m, h: m.second(h) + torch.zeros_like(m.second.weight)[0] + m.second.weight.new_zeros(1),
    "in training only": lambda m, h: h + m.second(h) if m.training else h,
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_layer_that_is_called_and_trained_is_converted(kind: str) -> None:
    assert outcome(CALLS[kind]) is None


IDLE: dict[str, tuple[Callable[[Pair, Tensor], Tensor], str]] = {
    "never called": (lambda m, h: h, NOT_CALLED),
    "an expert without tokens": (lambda m, h: torch.cat([h, m.second(h[:0])]), NOT_CALLED),
    "detached": (lambda m, h: h + m.second(h).detach(), NO_GRADIENT),
    "replaced": (lambda m, h: h + 0 * m.second(h).detach(), NO_GRADIENT),
}


@pytest.mark.parametrize("kind", IDLE)
def test_an_idle_layer_stays_unless_named(kind: str) -> None:
    rule, reason = IDLE[kind]
    assert outcome(rule) == reason and outcome(rule, include=["*", "second"]) is None


SELECTORS: dict[str, tuple[Callable[[Pair, Tensor], Tensor], int, str]] = {
    "topk": (
        lambda m, h: h * (m.second(h).float().sigmoid() + torch.ones(6)).topk(2)[0].sum(-1, keepdim=True),
        6,
        "a gate or mixing matrix, kept in full precision ([6, 32])",
    ),
    "picked": (
        lambda m, h: h * m.second(h).view(6, 2, 8).topk(2)[0].sum((1, 2))[:, None],
        16,
        "its output is picked from (topk)",
    ),
    "softmax": (lambda m, h: h * m.second(h).softmax(-1)[:, :1], 4, "a gate or mixing matrix"),
    "decay": (
        lambda m, h: h * torch.exp(-nn.functional.softplus(m.second(h))),
        32,
        "its output is exponentiated: a decay or a scale",
    ),
}


@pytest.mark.parametrize("kind", SELECTORS)
def test_a_layer_whose_output_selects_stays_unless_named(kind: str) -> None:
    rule, outputs, words = SELECTORS[kind]
    reason = outcome(rule, outputs)
    assert reason is not None and words in reason
    assert outcome(rule, outputs, include=["*", "second"]) is None


def test_wide_activations_select_nothing() -> None:
    assert outcome(lambda m, h: m.second(h).sigmoid() * h) is None
    assert outcome(lambda m, h: m.second(h).softmax(-1)) is None
    assert outcome(lambda m, h: nn.functional.softplus(m.second(h))) is None
    assert outcome(lambda m, h: torch.cat(m.second(h).split(16, -1)[::-1], -1).exp()) is None  # a part of a fused projection


def test_the_first_half_of_a_low_rank_gate_belongs_to_it() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 12), nn.Linear(12, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.value(x) * torch.exp(-nn.functional.softplus(self.b(self.a(x))))

    record = qat.convert(Gate(), probe=X)
    assert record.converted == ["value"] and record.skipped["a"].endswith("its output only feeds b, which is one")


def test_the_probe_leaves_no_trace() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 32))
            self.calls, self.kept, self.mean = 0, [1], torch.zeros(32)
            self.unused = nn.Linear(32, 32)  # so that the training mode is tried, too

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.kept.append(2)
            self.mean += x.mean(0)
            random.random()
            self.last = self.body(x)
            return self.last

    model = Counting()
    model.body[3].eval()
    model.body[0].bias.requires_grad_(False)
    model.body[0].weight.grad = torch.full((32, 32), 7.0)
    seen: list[int] = []
    model.body[0].register_forward_hook(lambda *_: seen.append(1))
    before, grads = {k: v.clone() for k, v in model.state_dict().items()}, model.body[0].weight.grad
    modes = {name: module.training for name, module in model.named_modules()}
    random.seed(1), torch.manual_seed(1)
    expected = random.random(), torch.rand(1)
    random.seed(1), torch.manual_seed(1)
    record = qat.convert(model, probe=X)
    assert (random.random(), torch.rand(1)) == expected and seen
    assert record.converted == ["body.0", "body.3"] and record.skipped["unused"] == NOT_CALLED
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert model.body[0].weight.grad is grads and grads.eq(7).all() and model.body[3].weight.grad is None
    assert not model.body[0].bias.requires_grad and model.body[0].weight.requires_grad
    assert model.calls == 0 and model.kept == [1] and not model.mean.any() and not hasattr(model, "last")
    assert "forward" not in vars(model.body[0])


@pytest.mark.parametrize("write", ["weight.div_(2)", "weight.data.mul_(3)", "weight[0] = 1", "bias.data = torch.ones(32)"])
def test_a_forward_that_writes_to_parameters_is_undone(write: str) -> None:
    class Rescaling(Pair):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                exec(f"second.{write}", {"second": self.second, "torch": torch})
            return self.first(x)

    model = Rescaling(CALLS["plain"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    qat.convert(model, probe=X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_decay_is_found_behind_what_depends_on_parameters_alone() -> None:
    class Decay(Pair):
        def __init__(self) -> None:
            super().__init__(lambda m, h: h)
            self.rate = nn.Parameter(torch.ones(32))

        def helper(self, h: Tensor) -> Tensor:
            steps = (-self.rate.float().exp() * nn.functional.softplus(self.second(h) + self.rate)).cumsum(0)
            return h * (steps - steps[:1]).exp()

    assert qat.convert(Decay(), probe=X).skipped["second"].endswith("its output is exponentiated: a decay or a scale")


def test_the_record_says_what_was_probed() -> None:
    unprobed, model = qat.convert(Pair(CALLS["plain"])), Pair(CALLS["plain"])
    assert unprobed.summary().endswith("; not probed") and Conversion.from_json(unprobed.to_json()).probe == "not probed"
    record = qat.convert(model, probe={"x": X})
    assert "not probed" not in record.summary() and Conversion.from_json(record.to_json()) == record
    assert record.probe == {
        "called": 2,
        "trained": 2,
        "cached": "not tried: no input_ids of at least 4 tokens",
        "packed_unequal": [],
    }


def test_a_layer_whose_packed_form_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PackedBitLinear.from_bitlinear.__func__

    def wrong(cls: type, layer: qat.BitLinear, layout: str = "2bit") -> PackedBitLinear:
        packed = right(cls, layer, layout)
        if layer.in_features == 16:
            packed.weight_scale *= 1.5
        return packed

    monkeypatch.setattr(PackedBitLinear, "from_bitlinear", classmethod(wrong))
    record = qat.convert(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16)), probe=X)
    assert record.probe["packed_unequal"] == ["1"] and record.summary().endswith("packed, these compute something else: 1")


@pytest.mark.parametrize("batch", [torch.zeros(2, 5), {"y": X}, {"x": X, "y": X}, "text"], ids=["shape", "key", "keys", "kind"])
def test_a_batch_that_does_not_fit_is_refused_and_nothing_changes(batch: object) -> None:
    model = Pair(CALLS["plain"])
    with pytest.raises(ValueError, match="probe"):
        qat.convert(model, probe=batch)
    assert type(model.first) is nn.Linear and "forward" not in vars(model.first)
