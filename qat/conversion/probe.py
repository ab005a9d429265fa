"""What a layer is, is probed: one batch, forward and backward, and a step over a cache, on the unconverted model.

Names and source text cannot say whether a layer is called (a vision tower in a run on text), whether its weight gets a gradient,
or who else reads it (a helper, a grandparent): a run can. The model is left as it was. Rejected: hooks, which see calls but not
reads, and miss `layer.forward(x)`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat.conversion.untouched import untouched
from qat.conversion.watch import Seen, Watch
from qat.nn.bitlinear import BitLinear
from qat.nn.packed import PackedBitLinear

ROWS = 64
"""Of each layer, which are packed for comparison."""
NOT_CALLED = "not called in the probe: nothing would train it"
NO_GRADIENT = "its weight got no gradient in the probe: nothing would train it"
NOT_IN_TRAINING = "called in eval mode only: nothing would train it"
FROZEN = "frozen (requires_grad=False) while other layers are trained: nothing would train it"
DRAWS = 8
"""Passes in training mode, of which each may drop layers at random."""


@dataclass
class Findings:
    """What the probe found: a record for each layer, and whether a cached step equals the full forward (else: why not)."""

    seen: dict[str, Seen]
    cached: bool | str
    unequal: list[str] = field(default_factory=list)
    """Layers whose packed form computes something else than the trained one."""

    def firm_reason(self, name: str) -> str | None:
        """Why a layer cannot be converted, whatever the user says."""
        seen = self.seen.get(name)
        if seen is None or not seen.reader:
            return None
        return f"its weight is read outside its own forward, by {seen.reader}, where quantization would not reach it"

    def soft_reason(self, name: str) -> str | None:
        """Why a layer should be left alone unless the user names it."""
        seen = self.seen.get(name)
        if seen is None:
            return None
        if not seen.called:
            return NOT_CALLED
        if not seen.gradient:
            return NO_GRADIENT
        if not seen.in_training:
            return NOT_IN_TRAINING
        if seen.frozen:
            return FROZEN
        if seen.decides:
            return f"a selector, kept in full precision: {seen.decides}"
        return None

    def follow_feeds(self, layers: Mapping[str, nn.Module]) -> None:
        """The narrow first half of a low-rank selector is a part of it."""
        for name, seen in self.seen.items():
            deciding = [target for target in seen.feeds if self.seen[target].decides]
            n, k = layers[name].weight.shape  # type: ignore[misc]
            if deciding and len(deciding) == len(seen.feeds) and n < k and not seen.decides:
                seen.decides = f"its output only feeds {deciding[0]}, which is one"

    def compare_packed(self, converted: Mapping[str, nn.Module]) -> None:
        """Pack a copy of each layer's first ROWS rows, and run both on the inputs seen; those that differ go to `unequal`."""
        for name, layer in converted.items():
            seen = self.seen.get(name)
            if seen is not None and seen.input is not None and isinstance(layer, BitLinear):
                part = _first_rows(layer)
                with torch.no_grad():
                    trained, packed = part(seen.input), PackedBitLinear.from_bitlinear(part)(seen.input)
                if not torch.equal(trained, packed):
                    self.unequal.append(name)
                seen.input = None

    def to_dict(self) -> dict[str, Any]:
        """For the record of a conversion."""
        called = sum(seen.called for seen in self.seen.values())
        trained = sum(seen.gradient for seen in self.seen.values())
        return {"called": called, "trained": trained, "cached": self.cached, "packed_unequal": self.unequal}


def _first_rows(layer: BitLinear) -> BitLinear:
    """A layer of the first ROWS outputs, with views of its parameters: packing all of a model takes longer than the probe may."""
    part = BitLinear(layer.in_features, min(ROWS, layer.out_features), False, layer.config, device="meta")
    part.weight = nn.Parameter(layer.weight.detach()[:ROWS], False)
    part.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach()[:ROWS], False)
    part.rms_norm = copy.deepcopy(layer.rms_norm)
    part.reset_quantizer()
    return part


def observe(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any) -> Findings:
    """Run `model` on `batch` and say what became of `layers` (name -> linear layer of the model).

    Args:
        batch: what the model is called with: a dict of its keyword arguments, a tuple of its positional ones, or one tensor.

    Raises:
        ValueError: the model cannot run this batch, or nothing that it returns can be differentiated.
    """
    args, kwargs = arguments(model, batch)
    with torch.inference_mode(False), untouched(model), _eager():
        seen = _watch(model, dict(layers), args, kwargs)
        with torch.no_grad():
            model.eval()
            cached = cached_step(model, kwargs.get("input_ids", args[0] if args else None))
    found = Findings(seen, cached)
    found.follow_feeds(layers)
    return found


def arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a batch, its tensors on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise ValueError("probe: the model's weights are on meta; a probe needs their values")

    def move(value: Any) -> Any:
        return value.detach().to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return (), {key: move(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(map(move, batch)), {}
    if isinstance(batch, Tensor):
        return (move(batch),), {}
    raise ValueError(f"probe is a {type(batch).__name__}; allowed are a dict of the model's arguments, a tuple, or a tensor")


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Without compiled parts and torch's fused attention, neither of which lets itself be watched."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _watch(model: nn.Module, layers: dict[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Seen]:
    """Without dropout first, then as in training: some layers are called, or read by others, only there.

    The second pass goes backward only where the first left layers open: auxiliary heads, for one, run only in training.
    """
    watch = Watch(layers)
    handles = _note_gradients(model, watch)
    try:
        first = _pass(model, watch, args, kwargs, training=False)
        second = _pass(model, watch, args, kwargs, training=True)
        for _ in range(DRAWS - 1):
            if second is not None or all(seen.in_training for seen in watch.seen.values() if seen.called):
                break
            second = _pass(model, watch, args, kwargs, training=True)
    finally:
        for handle in handles:
            handle.remove()
    if first is not None and second is not None:
        raise ValueError(f"probe: {type(model).__name__} cannot run this batch: {first}") from first
    if second is not None:
        for seen in watch.seen.values():
            seen.in_training = True
    return watch.seen


def _pass(model: nn.Module, watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> Exception | None:
    """One pass under watch, backward too while layers are open; what the model raised."""
    model.train(training)
    watch.training = training
    try:
        with watch, torch.enable_grad():
            output = model(*args, **kwargs)
            if not all(seen.called and seen.gradient for seen in watch.seen.values()):
                _backward(output)
    except Exception as error:  # whatever the model raises
        return error
    return None


def _note_gradients(model: nn.Module, watch: Watch) -> list[Any]:
    """Hooks that note a gradient and drop it at once: all of them would take the model's size in memory."""
    names: dict[int, list[str]] = {}
    for name, layer in watch.layers.items():
        names.setdefault(id(layer.weight), []).append(name)

    def note(parameter: Tensor) -> None:
        parameter.grad = None
        for name in names.get(id(parameter), ()):
            watch.seen[name].gradient = True

    trainable = [p for p in model.parameters() if p.is_floating_point()]
    return [parameter.requires_grad_(True).register_post_accumulate_grad_hook(note) for parameter in trainable]


def _backward(output: Any) -> None:
    targets = [tensor for tensor in _targets(output) if tensor.requires_grad]
    if not targets:
        raise ValueError("nothing that it returns can be differentiated")
    generator = torch.Generator().manual_seed(0)  # a sum would give nothing behind a softmax or a norm
    ways = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in targets]
    torch.autograd.backward(targets, ways)


def _targets(output: Any) -> list[Tensor]:
    """What training differentiates: the loss, else the logits, else all floating-point tensors of the output."""
    if isinstance(output, Mapping):
        for key in ("loss", "logits"):
            if isinstance(output.get(key), Tensor):
                return [output[key]]
        output = list(output.values())
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in _targets(value)]
    return _targets(list(vars(output).values())) if hasattr(output, "__dict__") else []


STEPS, TOKENS = 2, 16
FLOAT = 1e-5  # of the logits' size: float32 alone
SHARE = 0.2  # of what forgetting everything would change
ROUNDING, NEARER = 0.02, 0.5  # of the logits' size, as int8 activations round, where the step is twice as far from forgetting


def cached_step(model: Any, ids: Tensor | None) -> bool | str:
    """Whether tokens read one by one over the model's own cache give the logits of one pass; else why not, in words.

    The measure is what the model would answer if it had forgotten all but the last token: that is what a forward does that takes
    a cache's keyword and ignores it. `ids` int64 [B, T]; the first sequence is used.
    """
    if ids is None or ids.dim() != 2 or ids.shape[1] < STEPS + 2 or ids.is_floating_point():
        return "not tried: no input_ids of at least 4 tokens"
    ids = ids[:1, -TOKENS:]
    try:
        first = model(input_ids=ids[:, :-STEPS], use_cache=True)
        if not isinstance(first, Mapping) or first.get("logits") is None or first["logits"].dim() != 3:
            return "not tried: it returns no logits [B, T, V]"
        if first.get("past_key_values") is None:
            return "its forward returns no past_key_values"
        cache, output = first["past_key_values"], first
        for i in range(-STEPS, 0):
            token = ids[:, i : i + 1 or None]
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = output["past_key_values"]
        step, whole = output["logits"][0, -1], model(input_ids=ids, use_cache=False)["logits"][0, -1]
        forgot = model(input_ids=ids[:, -1:], use_cache=False)["logits"][0, -1]
    except Exception as error:  # whatever the model raises
        return f"a cached step fails: {str(error).partition(chr(10))[0]}"
    return same_step(step, whole, forgot) or "a cached step gives other logits than the full forward"


def same_step(step: Tensor, whole: Tensor, forgot: Tensor) -> bool:
    """Whether logits [V] of a step are those of one pass, by the measure of what a model without memory would answer."""
    step, whole, forgot = step.float(), whole.float(), forgot.float()
    error, size = (step - whole).norm(), (whole - whole.mean()).norm()
    if error <= FLOAT * size or error <= SHARE * (forgot - whole).norm():
        return True
    return bool(error <= ROUNDING * size and error <= NEARER * (step - forgot).norm())
