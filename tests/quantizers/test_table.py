"""The whole table, and quantizers that it does not have: the reference, every kernel, packed and unpacked give the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from kernel_checks import same
from throwaway import CASES, GROUP, THROWAWAY, put_in_the_table
from torch import Tensor

import qat
from qat import BitLinear, PackedBitLinear, QuantConfig, ops
from qat.ops import choice, cpu, reference
from qat.ops.options import training_options
from qat.quantizers import QUANTIZERS, latent
from qat.quantizers.components import sum_components
from qat.quantizers.record import Parameter, Quantizer, resolve
from qat.quantizers.scales import scale_rows

Config = Callable[..., QuantConfig]


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    put_in_the_table(monkeypatch)
    choice._say_once.cache_clear()
    yield


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case.values())))
def config(request: pytest.FixtureRequest) -> QuantConfig:
    return QuantConfig(**request.param)


def trained(config: QuantConfig, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, codes, scale and every gradient of a layer with these weights."""
    layer, x = a_layer(config), x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    gradients = [value.grad for value in (x, *layer.parameters())]
    assert all(value is not None for value in gradients)
    return [y, *layer.quantized(), *gradients]  # type: ignore[list-item]


def a_layer(config: QuantConfig) -> BitLinear:
    layer = BitLinear(2 * GROUP, 10, True, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(10, 2 * GROUP, generator=generator) / 30)
        layer.bias.copy_(torch.randn(10, generator=generator))
        layer.reset_quantizer()
    return layer


def operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(7, 2 * GROUP, generator=generator), torch.randn(7, 10, generator=generator)


def test_kernels_are_the_reference(config: QuantConfig) -> None:
    x, grad = operands()
    for backward in config.quantizer.backwards:
        if backward == "int8" and config.granularity == "group":
            continue
        c = replace(config, backward=backward)
        for found, wanted in zip(trained(c, x, grad), trained(replace(c, kernels="reference"), x, grad), strict=True):
            same(found, wanted)


def test_packed_and_unpacked_are_the_trained_layer(config: QuantConfig) -> None:
    layer, (x, _) = a_layer(config), operands()
    if not config.quantizer.packs_as:
        with pytest.raises(ValueError, match=r"quant.weight=quad.*its codes are -3, -1, 1, 3, and ternary ones are -1, 0, 1"):
            PackedBitLinear.from_bitlinear(layer)
        return
    for layout in ("2bit", "base3"):
        packed = PackedBitLinear.from_bitlinear(layer, layout)
        same(packed(x), layer(x))
        same(packed.codes(), layer.quantized()[0])
        same(packed.dequantize(), ops.fake_quantize(layer.weight, config, list(layer.quantizer_parameters().values())))


def test_codes_are_levels_and_gradients_the_records(config: QuantConfig) -> None:
    """Against the record's own functions, called on rows."""
    layer, (x, grad), record = a_layer(config), operands(), config.quantizer
    if record.sharpened:
        layer.set_beta(3.0)  # it starts as the identity
    layer(x).backward(grad)
    t, scale = layer.quantized()
    assert set(t.unique().tolist()) <= set(record.levels)
    x_q, x_scale = ops.quantize_activation(x, kernels="reference")
    of_weight = grad.t() @ (x_q * x_scale)
    if record.bias is not None:
        w = layer.weight.detach().requires_grad_()
        resolve(record.bias)(w, t).backward(grad.sum(0))
        assert w.grad is not None and bool(w.grad.any())
        of_weight = of_weight + w.grad
    if record.gradient is None:
        same(layer.weight.grad, of_weight)
        return
    k, own, planes = config.planes, config.components, t.float().chunk(config.planes, 1)
    rows = [scale_rows(value, config.granularity, config.group_size) for value in (of_weight, layer.weight.detach(), *planes)]
    codes = rows[2] if k == 1 else torch.stack(rows[2:])
    named = {
        name: latent.as_rows(value.detach(), own) if record.parameters[name].per == "scale" else value.reshape(1, 1)
        for name, value in layer.quantizer_parameters().items()
    }
    wanted, of_parameters = resolve(record.gradient)(*rows[:2], codes, latent.as_rows(scale, k).detach(), **named)
    same(layer.weight.grad, wanted.reshape(layer.weight.shape))
    assert of_parameters or not torch.equal(wanted, rows[0])
    assert own == 1 or torch.equal(wanted, rows[0])  # learned scales of a sum are straight-through
    for name, value in of_parameters.items():
        parameter = layer.get_parameter(name)
        assert parameter.grad is not None and parameter.numel() * k == scale.numel() * own
        same(parameter.grad, latent.from_rows(value, tuple(parameter.shape)))


def test_the_ops_trace(config: QuantConfig) -> None:
    layer, (x, _) = a_layer(config), operands()
    wanted = layer(x)
    torch._dynamo.reset()  # each case is another code for the same forward
    same(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), wanted)
    options = list(layer.quantizer_parameters().values())
    torch.library.opcheck(
        torch.ops.qat.bitlinear.default, (x, layer.weight, None, options, *training_options(config)), test_utils="test_schema"
    )


@pytest.mark.parametrize("lam", [0.25, 0.75])
def test_the_warm_up_blends_gradients_too(config: QuantConfig, lam: float) -> None:
    """(1 - lambda) of the identity and lambda of the quantizer's own."""
    x, grad = operands()
    layer = a_layer(replace(config, act_bits=None))
    layer(x).backward(grad)
    full = [value.grad for value in layer.parameters()]
    blended = a_layer(replace(config, act_bits=None))
    blended.set_lambda(lam)
    blended(x).backward(grad)
    mixed = lam * full[0] + (1 - lam) * grad.t() @ x  # type: ignore[operator]
    torch.testing.assert_close(blended.weight.grad, mixed, rtol=1e-5, atol=1e-5)
    for name in (name for name, one in config.quantizer.parameters.items() if one.trained):
        torch.testing.assert_close(blended.get_parameter(name).grad, lam * layer.get_parameter(name).grad)  # type: ignore[operator]


def test_a_replaced_row_is_noticed_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a name nor what was kept for it stands for a function: another one under the old name is another quantizer."""
    x, layer = torch.randn(3, 48), a_layer(QuantConfig())
    before = layer(x)
    monkeypatch.setitem(QUANTIZERS, "ternary", THROWAWAY["coarse"])
    same(layer(x), a_layer(QuantConfig(kernels="reference"))(x))
    assert not torch.equal(layer(x), before)


def test_a_changed_parameter_is_noticed_by_the_kernels() -> None:
    """The codes that a latent weight is kept with are of its parameters too."""
    x, layer = torch.randn(3, 48), a_layer(QuantConfig(weight="learned"))
    before = layer(x)
    with torch.no_grad():
        layer.step.mul_(3)
    wanted = a_layer(QuantConfig(weight="learned", kernels="reference"))
    with torch.no_grad():
        wanted.step.mul_(3)
    same(layer(x), wanted(x))
    assert not torch.equal(layer(x), before)


@pytest.mark.skipif(not cpu.compiled(), reason="no compiled kernels")
def test_what_no_kernel_declares_is_said_once_or_refused(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        ops.quantize_weight(torch.randn(64, 64), QuantConfig(weight="coarse"))
        a_layer(QuantConfig(weight="quad"))(torch.randn(2, 48))
        a_layer(QuantConfig(weight="learned"))(torch.randn(2, 48))
        a_layer(QuantConfig(components=2))(torch.randn(2, 48))
    served = (
        f"the compiled CPU kernels serve {', '.join(name for name in QUANTIZERS if name not in ('coarse', 'annealed', 'quad'))}"
    )
    wanted = [f"qat: quant.weight={name} runs in pure torch: {served}" for name in ("coarse", "quad")]
    assert [line for line in capfd.readouterr().err.splitlines() if "pure torch: the" in line] == wanted
    assert ops.backend(QuantConfig(weight="coarse"))["cpu"] == {"kernels": "reference", "why": served}
    assert ops.backend(QuantConfig(weight="learned"))["cpu"]["kernels"] == "compiled"
    insisting = QuantConfig(weight="coarse", kernels="compiled")
    message = "quant.kernels=compiled does not fit quant.weight=coarse: the compiled CPU kernels serve ternary, binary, .*learned"
    for call in (lambda: BitLinear(8, 8, config=insisting), lambda: ops.quantize_weight(torch.randn(2, 2), insisting)):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_row_that_contradicts_itself_is_refused() -> None:
    good = {"levels": (-1, 1), "codes": "qat.quantizers.binary:codes"}
    for wrong, message in (
        ({"levels": (-2, 0), "packs_as": ("ternary",)}, "cannot pack as 'ternary'"),
        ({"packs_as": ("8bit",)}, "cannot pack as '8bit'"),
        ({"levels": (-2, 0)}, "do not fit the int8 backward pass"),
        ({"parameters": {"weight": Parameter(max)}}, "cannot be called weight or bias"),
        ({"parameters": {"step": Parameter(max)}}, "parameters step are trained, so the quantizer needs a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            Quantizer(**{**good, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="per='row' is not allowed"):
        Parameter(max, per="row")


def test_the_wrong_number_of_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quant.weight=learned has the parameters step, but 0 came"):
        latent.quantize_weight(
            torch.randn(2, 4), latent.WeightOptions("learned", "absmean", "tensor", None, 1, "fitted", "float32", 1e-5, 1.0)
        )


def test_parameters_on_another_device_are_refused() -> None:
    layer = a_layer(QuantConfig(weight="learned"))
    with pytest.raises(ValueError, match=r"parameters\[0\] is on meta, but the weight is on cpu"):
        ops.quantize_weight(layer.weight, layer.config, [layer.step.to("meta")])


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, qat.quantizers, qat.config; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_several_planes_are_summed() -> None:
    layer = a_layer(QuantConfig(components=2))
    t, scale = layer.quantized()
    a, b = t[:, :48] * scale[:, :1], t[:, 48:] * scale[:, 1:]
    same(sum_components(torch.cat([a, b], 1), 2), a + b)
    assert qat.QuantConfig(components=2).quantizer.planes == (2, 3, 4)


def test_sums_of_larger_codes_stay_exact() -> None:
    """Beyond 2^24 float32 holds no odd numbers: the width at which sums need float64 depends on the largest code."""
    k = 60_000
    x, t = torch.full((1, k), 127.0), torch.full((1, k), 3, dtype=torch.int8)
    x[0, 0] = 126
    wanted = torch.tensor([[float(3 * (127 * k - 1))]])
    one = torch.ones(1, 1)
    same(reference.integer_linear(x, None, t, one, None, torch.float32, largest=3), wanted)
