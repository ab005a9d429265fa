"""convert, pack, unpack and the record: what is converted, what is skipped with which reason, what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn

import qat
from qat import BitLinear, Conversion, PackedBitLinear, QuantConfig
from qat.conversion import bitlinears, set_lambda

transformers_conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    """A language model small enough to read: embedding, two blocks, an output head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(8, 16, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


BLOCKS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")]
TOKENS = torch.arange(6).reshape(2, 3)


def assert_untouched(model: nn.Module) -> None:
    assert not any(isinstance(module, BitLinear | PackedBitLinear) for module in model.modules())


def test_all_but_the_head_is_converted_and_said() -> None:
    model = Model()
    record = qat.convert(model)
    assert record.converted == BLOCKS == [name for name, _ in bitlinears(model)]
    assert record.skipped == {"lm_head": "output head, kept in full precision"}
    assert record.summary() == "4 of 5 linear layers converted; skipped lm_head (output head, kept in full precision)"


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, "*down", ["blocks.0.up", "blocks.1.up"]),
        ("*down", None, ["blocks.0.down", "blocks.1.down"]),
        (["blocks.0.*"], ["*.up"], ["blocks.0.down"]),
        ("*", None, BLOCKS),
        ("lm_head", None, ["lm_head"]),
        (["*", "lm_head"], "blocks.1.*", ["blocks.0.up", "blocks.0.down", "lm_head"]),
    ],
)
def test_patterns_choose(include: object, exclude: object, expected: list[str]) -> None:
    model = Model()
    record = qat.convert(model, include=include, exclude=exclude)
    assert record.converted == expected == [name for name, _ in bitlinears(model)]
    assert set(record.converted) | set(record.skipped) == {*BLOCKS, "lm_head"}


@pytest.mark.parametrize("patterns", [{"include": "embed"}, {"exclude": "*"}, {"include": "lm_head", "exclude": "lm_head"}])
def test_zero_matches_is_an_error_that_lists_the_reasons(patterns: dict[str, str]) -> None:
    model = Model()
    with pytest.raises(
        ValueError, match="nothing to convert: 0 of 5 linear layers converted; skipped .* in Model; check include"
    ):
        qat.convert(model, **patterns)
    assert_untouched(model)


def test_a_model_without_linear_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to convert"):
        qat.convert(nn.Sequential(nn.ReLU()))


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


def test_a_tied_head_is_left_alone_whatever_its_name() -> None:
    model = Model()
    model.projection = nn.Linear(8, 16, bias=False)
    model.projection.weight = model.embed.weight
    record = qat.convert(model, include=["projection", "*up"])
    assert record.skipped["projection"] == "tied to the embedding embed" and type(model.projection) is nn.Linear


def test_a_weight_tied_to_a_custom_embedding_is_left_alone() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(16, 8))

    model = nn.ModuleDict({"lookup": Lookup(), "body": nn.Linear(8, 8), "out": nn.Linear(8, 16)})
    model["out"].weight = model["lookup"].table
    record = qat.convert(model)
    assert record.converted == ["body"] and record.skipped["out"] == "tied to Lookup lookup"


def test_routers_are_left_alone_unless_named() -> None:
    def moe() -> nn.ModuleDict:
        return nn.ModuleDict({"gate": nn.Linear(8, 2), "experts": nn.ModuleList([Block(), Block()])})

    record = qat.convert(moe())
    assert record.skipped == {"gate": "MoE router, kept in full precision"} and len(record.converted) == 4
    assert qat.convert(moe(), include=["gate"]).converted == ["gate"]


def test_a_gate_without_experts_is_an_ordinary_layer() -> None:
    assert qat.convert(nn.ModuleDict({"gate": nn.Linear(8, 8)})).converted == ["gate"]


def test_layers_that_a_walker_cannot_take_are_skipped_with_a_reason() -> None:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = nn.utils.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "own": Own(4, 4),
            "patched": patched,
            "normed": normed,
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "conv": nn.Conv1d(4, 4, 3),
            "lstm": nn.LSTM(4, 4),
        }
    )
    record = qat.convert(model)
    assert record.converted == ["plain"]
    assert record.skipped["own"] == "Own has a forward of its own"
    assert record.skipped["patched"] == "its forward was replaced by another"
    assert record.skipped["normed"].startswith("its weight is computed")
    assert record.skipped["parametrized"] == "its weight is parametrized"
    assert record.skipped["conv.weight"] == "Conv1d is neither nn.Linear nor Conv1D"
    assert record.skipped["lstm.weight_ih_l0"] == "LSTM is neither nn.Linear nor Conv1D"


def test_a_layer_whose_weight_the_parent_reads_itself_is_skipped() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.read, self.checked = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            nn.init.zeros_(self.called.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.checked(self.called(x).to(self.checked.weight.dtype))
            return nn.functional.linear(x, self.read.weight)

    record = qat.convert(Parent())
    assert record.converted == ["called", "checked"] and record.skipped == {"read": "Parent reads this weight itself"}


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


def test_experts_in_one_3d_parameter_are_refused_and_then_excluded_knowingly() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Parameter(torch.randn(3, 8, 8))

    model = nn.ModuleDict({"attention": nn.Linear(8, 8), "mlp": nn.ModuleDict({"experts": Experts()})})
    message = r"mlp.experts \(Experts\) stores 3 expert matrices as the one 3-D parameter 'gate_up' \[3, 8, 8\]"
    with pytest.raises(ValueError, match=message) as refused:
        qat.convert(model)
    assert_untouched(model)
    hint = str(refused.value).rpartition("exclude=")[2].strip("'")
    record = qat.convert(model, exclude=hint)
    assert record.converted == ["attention"] and list(record.skipped) == ["mlp.experts.gate_up"]


@pytest.mark.parametrize("prepare", [qat.convert, lambda model: (qat.convert(model), qat.pack(model))])
def test_a_converted_model_is_refused(prepare: object) -> None:
    model = Model()
    prepare(model)
    with pytest.raises(ValueError, match="already converted: blocks.0.up is a (Packed)?BitLinear"):
        qat.convert(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantized_weight_is_refused(dtype: torch.dtype) -> None:
    model = Model()
    model.blocks[1].up.weight = nn.Parameter(torch.zeros(12, 8).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match="already quantized: blocks.1.up holds torch"):
        qat.convert(model)


def test_a_quantized_layer_of_another_class_is_refused() -> None:
    foreign = nn.Module()
    foreign.register_buffer("weight", torch.zeros(4, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"already quantized: 1 holds torch.uint8 weights"):
        qat.convert(nn.Sequential(nn.Linear(4, 4), foreign))


def test_a_quantization_config_is_refused() -> None:
    model = Model()
    model.config = type("Config", (), {"quantization_config": {"bits": 4}})()
    with pytest.raises(ValueError, match="already quantized: the model's config has a quantization_config"):
        qat.convert(model)


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


@pytest.mark.parametrize("kind", ["bitlinear", "packed"])
def test_the_record_as_json_rebuilds_the_layers_in_a_fresh_model(kind: str) -> None:
    model, config = Model(), QuantConfig(granularity="channel", scale="absmax", act_granularity="tensor", eps=1e-4)
    record = qat.convert(model, config, exclude="*0.up")
    record = record if kind == "bitlinear" else qat.pack(model, layout="base3")
    fresh = Model().eval()
    again = Conversion.from_json(record.to_json())
    assert again == record
    again.apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(TOKENS), model(TOKENS)) and not fresh.blocks[1].up.training
    with pytest.raises(ValueError, match="the record converts 'blocks.0.down', which is a .*BitLinear in this Model"):
        again.apply(fresh)


def test_the_record_rebuilds_conv1d_layers() -> None:
    model, fresh, x = nn.Sequential(transformers_conv1d(5, 8)), nn.Sequential(transformers_conv1d(5, 8)), torch.randn(2, 8)
    qat.convert(model)
    Conversion.from_json(qat.pack(model).to_json()).apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_a_record_of_another_model_names_the_missing_layer_and_changes_nothing() -> None:
    record, other = qat.convert(Model()), nn.ModuleDict({"blocks": nn.ModuleList([Block()])})
    with pytest.raises(ValueError, match="the record converts 'blocks.1.up', which is missing in this ModuleDict"):
        record.apply(other)
    assert_untouched(other)


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"kind": "unpacked"}, {"config": {"weight": "int4"}}, {"extra": 1}, {"kind": "packed", "layout": None}],
    ids=str,
)
def test_a_record_that_is_not_ours_is_refused(change: dict[str, object]) -> None:
    data = json.loads(qat.convert(Model()).to_json())
    for text in (json.dumps({**data, **change}), "{}", "[]", "not json"):
        with pytest.raises(ValueError, match="not a conversion record of qat"):
            Conversion.from_json(text)


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
    qat.convert(model.blocks[0], QuantConfig(weight="binary"))
    qat.convert(model.blocks[1])
    with pytest.raises(ValueError, match="blocks.1.up and blocks.0.up have different configs"):
        qat.pack(model)
    assert qat.pack(model.blocks[0]).config.weight == "binary" and qat.pack(model.blocks[1]).config.weight == "ternary"


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


def test_multihead_attention_says_that_it_reads_its_weights_itself() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    record = qat.convert(model)
    assert record.converted == ["mlp"]
    assert "never calls the layer" in record.skipped["attention.out_proj"] and "attention.in_proj_weight" in record.skipped


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


def test_a_pattern_stands_for_everything_inside() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "b": nn.Linear(4, 4)})
    assert qat.convert(model, exclude="a").converted == ["b"]


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(key: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=rf"{key}=.*typo' matches no module of Sequential"):
        qat.convert(model, **{key: ["0", "*.typo"]})
    assert type(model[0]) is nn.Linear
