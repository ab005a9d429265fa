"""convert, pack and unpack: layers are swapped in place, keep what they were, and give the same numbers."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from tiny import Model, assert_untouched
from torch import nn

import qat
from qat import BitLinear, PackedBitLinear, QuantConfig
from qat.conversion.layers import bitlinears, set_lambda

transformers_conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
TOKENS = torch.arange(6).reshape(2, 3)


def test_a_linear_layer_as_root_is_converted_packed_and_unpacked_in_place() -> None:
    root, x = nn.Linear(8, 4), torch.randn(3, 8)
    weight = root.weight
    assert qat.convert(root, QuantConfig(act_bits=None)).converted == [""]
    assert isinstance(root, BitLinear) and root.weight is weight
    y = root(x)
    qat.pack(root)
    assert isinstance(root, PackedBitLinear) and torch.equal(root(x), y)
    qat.unpack(root)
    assert type(root) is nn.Linear
    torch.testing.assert_close(root(x), y)


def test_mode_requires_grad_dtype_and_parameters_are_kept() -> None:
    model = Model().to(torch.bfloat16).eval()
    model.blocks[0].train()
    model.blocks[1].up.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    qat.convert(model)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert model.blocks[0].up.training and not model.blocks[1].up.training
    assert not model.blocks[1].up.weight.requires_grad
    qat.pack(model)
    assert model.blocks[0].up.training and not model.blocks[1].up.training


def test_a_meta_model_converts_on_meta() -> None:
    with torch.device("meta"):
        model = Model()
    qat.convert(model)
    assert model.blocks[0].up.weight.is_meta and model(TOKENS.to("meta")).shape == (2, 3, 16)


def test_conv1d_is_transposed_right() -> None:
    model, x = nn.Sequential(transformers_conv1d(12, 8), nn.GELU(), transformers_conv1d(8, 12)), torch.randn(3, 8)
    with torch.no_grad():
        model[0].bias.normal_()
    model[0].weight.requires_grad_(False)
    expected = model(x)
    record = qat.convert(model, QuantConfig(act_bits=None))
    assert record.converted == ["0", "2"] and not model[0].weight.requires_grad
    set_lambda(model, 0)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", [nn.Linear, transformers_conv1d])
def test_parameters_shared_by_two_layers_stay_shared(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(8, 8), kind(8, 8))
    model[1].weight = model[0].weight
    record = qat.convert(model)
    assert record.converted == ["0", "1"] and model[0].weight is model[1].weight
    fresh = nn.Sequential(kind(8, 8), kind(8, 8))
    fresh[1].weight = fresh[0].weight
    record.apply(fresh)
    assert fresh[0].weight is fresh[1].weight


def test_a_shared_module_is_converted_once_and_stays_shared() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    record = qat.convert(model)
    assert record.converted == ["a"] and record.skipped == {"b.0": "the same module as a"}
    assert model["a"] is model["b"][0] and isinstance(model["a"], BitLinear)
    assert qat.pack(model).converted == ["a"] and model["a"] is model["b"][0]


def test_forward_hooks_survive_and_can_be_removed() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 4)), []
    handle = model[0].register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    qat.convert(model)
    model(torch.randn(1, 4))
    qat.pack(model)
    model(torch.randn(1, 4))
    handle.remove()
    model(torch.randn(1, 4))
    assert seen == ["BitLinear", "PackedBitLinear"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_nothing_changes(value: float) -> None:
    model = Model()
    with torch.no_grad():
        model.blocks[1].down.weight[2, 3] = value
    with pytest.raises(ValueError, match=r"blocks.1.down.weight holds NaN or infinite values"):
        qat.convert(model)
    assert_untouched(model)


def test_a_group_size_that_fits_only_some_layers_changes_nothing() -> None:
    model = Model()
    expected = model(TOKENS)
    with pytest.raises(ValueError, match="blocks.0.down: in_features=12 is not a multiple of quant.group_size=8"):
        qat.convert(model, QuantConfig(granularity="group", group_size=8))
    assert_untouched(model)
    assert torch.equal(model(TOKENS), expected)


@pytest.mark.parametrize("layout", ["2bit", "base3"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_packed_model_equals_trained_model(granularity: str, layout: str) -> None:
    model = Model()
    converted = qat.convert(model, QuantConfig(granularity=granularity, group_size=4 if granularity == "group" else None))
    expected = model(TOKENS)
    record = qat.pack(model, layout=layout)
    assert record.converted == converted.converted and (record.kind, record.layout) == ("packed", layout)
    assert torch.equal(model(TOKENS), expected)


def test_unpacked_model_equals_packed_without_activation_quantization() -> None:
    model = Model()
    qat.convert(model, QuantConfig(act_bits=None))
    qat.pack(model)
    expected = model(TOKENS)
    record = qat.unpack(model)
    assert record.kind == "unpacked" and type(model.blocks[0].up) is nn.Linear
    torch.testing.assert_close(model(TOKENS), expected)
    assert model.blocks[0].up.weight.unique().numel() == 3


def test_pack_and_unpack_refuse_models_without_their_layers() -> None:
    with pytest.raises(ValueError, match="Model has no BitLinear layer to be packed"):
        qat.pack(Model())
    with pytest.raises(ValueError, match="Model has no PackedBitLinear layer to be unpacked"):
        qat.unpack(Model())


def test_unpack_refuses_layers_that_norm_their_input() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    qat.convert(model, QuantConfig(rms_norm_eps=1e-6))
    qat.pack(model)
    with pytest.raises(ValueError, match="0 norms its own input .quant.rms_norm_eps., which no nn.Linear does"):
        qat.unpack(model)
    assert type(model[0]) is PackedBitLinear


def test_pack_refuses_what_it_cannot_hold_and_changes_nothing() -> None:
    model = Model()
    qat.convert(model)
    with pytest.raises(ValueError, match="layout='int4' is not known"):
        qat.pack(model, layout="int4")
    set_lambda(model, 0.5)
    with pytest.raises(ValueError, match=r"blocks.0.up still blends quantization in \(lambda=0.5\)"):
        qat.pack(model)
    set_lambda(model, 1)
    with torch.no_grad():
        model.blocks[1].up.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="blocks.1.up.weight holds NaN"):
        qat.pack(model)
    assert len(list(bitlinears(model))) == 4


def test_one_record_never_speaks_for_two_configs() -> None:
    model = Model()
    qat.convert(model.blocks[0], QuantConfig(weight="binary", act_bits=None))
    qat.convert(model.blocks[1])
    with pytest.raises(ValueError, match="blocks.1.up and blocks.0.up have different configs"):
        qat.pack(model)
    assert qat.pack(model.blocks[0]).config.weight == "binary" and qat.pack(model.blocks[1]).config.weight == "ternary"


def test_one_record_says_whose_codes_are_others() -> None:
    model = Model()
    qat.convert(model.blocks[0])
    qat.convert(model.blocks[1].up, QuantConfig(weight="binary"))
    qat.convert(model.blocks[1].down)
    assert qat.pack(model).config == QuantConfig(overrides={"blocks.1.up": {"weight": "binary"}})


def test_unpack_refuses_bytes_that_hold_no_codes() -> None:
    model = Model()
    qat.convert(model)
    qat.pack(model, layout="base3")
    model.blocks[0].up.packed.fill_(255)
    with pytest.raises(ValueError, match="255 holds no ternary codes"):
        qat.unpack(model)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fused_encoder_path_does_not_bypass_quantization(stack: bool, masked: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = (nn.TransformerEncoder(layer, 2) if stack else layer).eval()
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None

    def outputs(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """As a user gets it, and with torch's fused path forbidden; padded positions are left out."""
        with torch.no_grad():
            found = model(x, src_key_padding_mask=mask)
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                plain = model(x, src_key_padding_mask=mask)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
        keep = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask
        return found[keep], plain[keep]

    full = outputs(model)[1]
    record = qat.convert(model, QuantConfig(act_bits=None))
    assert all(name.endswith(("linear1", "linear2")) for name in record.converted)
    assert len(record.converted) == (4 if stack else 2)
    found, plain = outputs(model)
    torch.testing.assert_close(found, plain)
    assert (found - full).abs().max() > 1e-2
    again = outputs(copy.deepcopy(model))[0]
    qat.pack(model)
    packed, packed_plain = outputs(model)
    assert torch.equal(again, found) and torch.equal(packed, found) and torch.equal(packed_plain, plain)
    qat.unpack(model)
    assert outputs(model)[0].shape == found.shape


def test_a_converted_model_compiles_as_one_graph() -> None:
    model = Model()
    qat.convert(model)
    expected = model(TOKENS)
    expected.sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(TOKENS)
    y.sum().backward()
    assert torch.equal(y, expected)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_core_works_with_torch_alone() -> None:
    script = """
        import sys

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in BLOCKED:
                    raise ImportError(name + " is blocked")

        BLOCKED = {"transformers", "lightning", "hydra", "omegaconf", "safetensors", "datasets", "tokenizers"}
        sys.meta_path.insert(0, Block())
        import qat
        assert "torch" not in sys.modules, "import qat alone must be quick"
        import torch
        model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)), torch.randn(2, 8)
        qat.convert(model, qat.QuantConfig())
        y = model(x)
        y.sum().backward()
        qat.pack(model)
        assert torch.equal(model(x), y)
        qat.unpack(model)
        assert not BLOCKED & set(sys.modules)
        print("fine")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "fine", done.stderr
