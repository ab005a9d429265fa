"""The emulation catches what breaks CUDA kernels: wrong accesses, divergence, and every barrier or wait that is taken out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from emulator import (
    Emulator,
    PackedLinear,
    QuantizeActivation,
    QuantizeWeight,
    expected_linear,
    output,
    packed_linear,
    problem,
    quantize_activation,
    quantize_weight,
)
from kernel_checks import EPS, same, tokens

from qat.quantizers import activations


@pytest.mark.parametrize("at_end", [True, False])
def test_access_outside_of_memory_is_caught(gpu: Emulator, at_end: bool) -> None:
    """Told of one row more, or given the row before, the kernel touches the guard page."""
    gpu.at_end = at_end
    x, codes = gpu.put(torch.randn(2, 64)), gpu.empty(2, 64, dtype=torch.int8)[0]
    assert x is not None
    shift, m = (0, 3) if at_end else (-256, 1)
    with pytest.raises(AssertionError, match="outside of memory"):
        gpu.run("run_quantize_activation", QuantizeActivation(x + shift, 0, m, 64, False, EPS, None, 0, codes, None, None, None))


BROKEN = ["deadlock: thread", "a divergent warp: another lane is at", "outside of memory by thread 3", "a misaligned copy"]
BROKEN += ["a product of bytes that are not fenced", "a product of bytes that are not fenced"]


@pytest.mark.parametrize("kind", range(len(BROKEN)))
def test_broken_kernels_are_caught(gpu: Emulator, kind: int) -> None:
    for gpu.order in range(3):
        with pytest.raises(AssertionError, match=BROKEN[kind]):
            gpu.run("run_broken", kind)


def decode_one(gpu: Emulator) -> None:
    p = problem(1, 130, 1344, dtype=torch.float32)
    p.x[0, -1] = 50  # what the first threads must wait for
    same(packed_linear(gpu, p), expected_linear(p))


def decode_few(gpu: Emulator) -> None:
    p = problem(11, 40, 1600)
    same(packed_linear(gpu, p), expected_linear(p))


def decode_groups(gpu: Emulator) -> None:
    p = problem(2, 40, 2048, 4)
    same(packed_linear(gpu, p), expected_linear(p))


def many_tokens(gpu: Emulator) -> None:
    p = problem(66, 70, 576)
    same(packed_linear(gpu, p, tile="small"), expected_linear(p))


def many_tokens_in_splits(gpu: Emulator) -> None:
    p = problem(66, 70, 960)  # of 5 stages each: the last is where sums are turned
    same(packed_linear(gpu, p, tile="small", splits=3), expected_linear(p))


def many_tokens_on_hopper(gpu: Emulator) -> None:
    p = problem(140, 100, 768, dtype=torch.float32)
    same(packed_linear(gpu, p, tile="hopper"), expected_linear(p))


def chained(gpu: Emulator) -> None:
    """Three layers for one token, each launched early: no read of y and of its own weights before the launch ahead has ended."""
    layers = [problem(1, 256, 256, groups, dtype=torch.float32) for groups in (1, 2, 4)]
    y, address = layers[0].x, gpu.put(layers[0].x)
    for p in layers:
        p.x = y
        y = expected_linear(p)
        packed, _ = gpu.empty(*p.packed.shape, dtype=torch.uint8)
        latent = p.t.float()  # with the scale 1 its codes are t
        t, _ = gpu.empty(*p.t.shape, dtype=torch.int8)
        arguments = (1, 1, 2, False, 0, EPS, t, packed, gpu.put(torch.ones(p.t.shape[0], 1)), None)
        gpu.run("run_quantize_weight", QuantizeWeight(gpu.put(latent), 0, *p.t.shape, *arguments))
        out, read = output(gpu, p)
        call = PackedLinear(address, False, EPS, packed, 1, *p.t.shape, p.groups, out, None, None, None, None, True)
        gpu.run("run_packed_linear", call)
        address = out.y
        same(read(), y)


def long_token(gpu: Emulator) -> None:
    x = tokens(2, 4500, torch.float32)
    same(quantize_activation(gpu, x, per_tensor=False)[0], activations.activation_codes(x, "token", EPS)[0])


def long_norm(gpu: Emulator) -> None:
    x = tokens(1, 4500, torch.float32).abs()
    codes = quantize_activation(gpu, x, False, torch.ones(4500))[0]
    normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert (codes.int() - activations.activation_codes(normal, "token", EPS)[0].int()).abs().max() <= 1


def weight_tensor(gpu: Emulator) -> None:
    w = torch.randn(64, 400)
    w[-1] *= 50
    found = quantize_weight(gpu, w, "binary", "absmean", "tensor", 1)
    torch.testing.assert_close(found.scale, w.abs().mean().reshape(1, 1))
    same(found.t, torch.where(w > w.double().mean(), 1, -1).to(torch.int8))


WORK = [
    decode_one,
    decode_few,
    decode_groups,
    many_tokens,
    many_tokens_in_splits,
    many_tokens_on_hopper,
    chained,
    long_token,
    long_norm,
    weight_tensor,
]


def test_every_barrier_matters(gpu: Emulator) -> None:
    """Each barrier and wait that a kernel meets is taken out; in at least one order of threads the result is then wrong."""
    reached: dict[str, list[Callable[[Emulator], None]]] = {}
    gpu.sites()
    for work in WORK:
        work(gpu)
        for site in gpu.sites():
            reached.setdefault(site, []).append(work)
    files = {"decode.cu", "gemm.cu", "gemm_hopper.cu", "reduce.h", "split.cu"}
    assert {site.partition(":")[0] for site in reached} == files, sorted(reached)

    def noticed(site: str, work: Callable[[Emulator], None]) -> bool:
        for order in range(3):
            gpu.order = order
            gpu.skip(site)
            try:
                work(gpu)
            except AssertionError:
                return True
            finally:
                gpu.skip(None)
                gpu.free()
        return False

    pairs = [(site, work) for site, works in sorted(reached.items()) for work in works]
    unnoticed = [f"{site} in {work.__name__}" for site, work in pairs if not noticed(site, work)]
    assert not unnoticed, f"nothing fails without the barrier at {', '.join(unnoticed)}"
