"""Our own folder and the stock transformers folder: round trips, what is refused, damaged files, planted faults."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen2Config

import qat
from qat.conversion.layers import packed_layers
from qat.export import __main__ as verb
from qat.formats import FORMATS, get_format
from qat.formats.bitnet import read_back as verification
from qat.formats.bitnet import writing as hf
from qat.formats.bitnet.tensors import pack_rows
from qat.formats.folder import new_folder, read_metadata
from qat.formats.packed import folder as packed
from qat.formats.packed.manifest import parse, sealed
from qat.formats.seal import SUMS
from qat.metrics.perplexity import windows

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 43,  # odd: padded to 44
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def _no_dynamo() -> Iterator[None]:
    """transformers compiles its bitnet unpacking otherwise: 19 s at the first call on a CPU."""
    with torch._dynamo.config.patch(disable=True):
        yield


IDS = torch.randint(64, (512,), generator=torch.Generator().manual_seed(0))
WINDOWS = list(windows(IDS, 64))


def packed_model(config=None, layout="2bit", exclude=None, **quant):
    torch.manual_seed(0)
    config = config or LlamaConfig(**SMALL, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    record = qat.convert(model, qat.QuantConfig(**quant), exclude=exclude)
    qat.pack(model, layout=layout)
    return model, record


def qwen2(**changes):
    return Qwen2Config(**{**SMALL, "tie_word_embeddings": False, **changes})


@pytest.fixture(scope="module")
def llama():
    return packed_model()[0]


@pytest.fixture(scope="module")
def qwen():
    return packed_model(qwen2())[0]


@pytest.fixture
def in_process(monkeypatch):
    """Answer verification's question in this process: the same script, a second faster."""
    spec = importlib.util.spec_from_file_location("stock_reader", verification.READER.script)
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    reader.sys = SimpleNamespace(exit=sys.exit, modules={})

    def ask(folder, write, read):
        asked, answered = folder.parent / "request", folder.parent / "result"
        write(asked)
        reader.main(str(folder), asked, answered)
        return read(answered)

    monkeypatch.setattr(verification, "READER", SimpleNamespace(ask=ask))


def verify(folder, model):
    return hf.read_back(folder, model, IDS[:64][None], WINDOWS, bfloat16=False)


# our own folder


@pytest.mark.parametrize("layout", ["2bit", "base3"])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_round_trip_is_exact(tmp_path, layout, tied):
    model, record = packed_model(qwen2(tie_word_embeddings=tied), layout, granularity="channel")
    folder = packed.save(model, tmp_path / "packed", record, extra={"card": {"license": "mit"}})
    again = packed.load(folder)
    assert torch.equal(again(IDS[None, :64]).logits, model(IDS[None, :64]).logits)
    assert not again.training and packed.read_extra(folder) == {"card": {"license": "mit"}}
    kept, widths = parse(packed.read_config(folder)["quantization_config"])
    assert set(kept.converted) == set(record.converted) and kept.skipped == record.skipped and kept.layout == layout
    assert widths["model.layers.0.mlp.down_proj"] == 43
    assert "rms_norm_eps" not in packed.read_config(folder)["quantization_config"]["quant"]  # older versions do not know it
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied


def test_the_same_model_is_the_same_bytes(tmp_path, llama):
    """The library puts the metadata in an order of its own, another one each time."""
    for write in (packed.save, hf.save):
        for name in "abcdef":
            write(llama, tmp_path / write.__module__ / name)
        files = [(tmp_path / write.__module__ / name / "model.safetensors").read_bytes() for name in "abcdef"]
        assert len(set(files)) == 1


def test_packed_state_of_any_module(tmp_path):
    def fresh():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(13, 7), nn.ReLU(), nn.Linear(7, 3, bias=False))

    model = fresh()
    record = qat.convert(model, qat.QuantConfig(weight="binary", kernels="auto"))
    qat.pack(model, layout="base3")
    packed.save_state(model, tmp_path / "a.safetensors", record)
    again = fresh()
    assert packed.load_state(again, tmp_path / "a.safetensors").config.weight == "binary"
    x = torch.randn(4, 13)
    assert torch.equal(again(x), model(x))


def test_sizes(tmp_path, llama):
    packed.save(llama, tmp_path / "packed")
    rows = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32), "gate": (43, 32), "up": (43, 32), "down": (32, 43)}
    linears = 2 * sum(n * -(-k // 4) + 4 for n, k in rows.values())
    parameters = 64 * 32 + 2 * (sum(n * k for n, k in rows.values()) + 2 * 32) + 32
    whole = (tmp_path / "packed/model.safetensors").stat().st_size
    expected = {"packed_model": whole, "packed_linears": linears, "full_precision_bf16": 2 * parameters}
    assert packed.sizes(llama) == packed.sizes(tmp_path / "packed") == expected
    assert packed.full_precision_bf16(AutoModelForCausalLM.from_config(llama.config)) == 2 * parameters


def rewrite(file, change, **metadata):
    """Write `file` again after `change(tensors)`."""
    tensors, old = load_file(file), read_metadata(file)
    change(tensors)
    save_file(tensors, file, {key: value for key, value in {**old, **metadata}.items() if value is not None})


Q = "model.layers.0.self_attn.q_proj"


def test_damaged_packed_files_are_named(tmp_path):
    model, record = packed_model(layout="base3")
    file = packed.save(model, tmp_path / "packed", record) / "model.safetensors"
    file.with_name(SUMS).unlink()  # as of an earlier version: what the readers find without it
    config = file.with_name("config.json")
    whole, said = file.read_bytes(), config.read_text()

    def flip(tensors):
        tensors[f"{Q}.weight"][1, 2] ^= 1

    def bad_byte(tensors):
        tensors[f"{Q}.weight"][1, 2] = 243

    def say(change):
        manifest = json.loads(said)
        change(manifest["quantization_config"])
        manifest["quantization_config"] = sealed(manifest["quantization_config"])
        config.write_text(json.dumps(manifest))

    unchecked = {"crc32": None}
    cases = [
        (lambda: rewrite(file, flip), rf"'{Q}.weight' is damaged"),
        (lambda: rewrite(file, bad_byte, **unchecked), rf"{Q}.packed\[1, 2\] = 243"),
        (lambda: rewrite(file, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:, 1:].contiguous()})), f"{Q}.weight"),
        (lambda: rewrite(file, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float()}), **unchecked), f"{Q}.weight is"),
        (lambda: rewrite(file, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][1:].contiguous()})), f"{Q}.weight"),
        (lambda: rewrite(file, lambda t: t[f"{Q}.weight_scale"].mul_(-1), **unchecked), "not finite and above 0"),
        (lambda: rewrite(file, lambda t: t.pop(f"{Q}.weight")), f"no tensor {Q}.weight"),
        (lambda: rewrite(file, lambda t: t.pop("model.norm.weight")), "no weights for 1 tensors of the model, the first is"),
        (lambda: rewrite(file, lambda t: t["model.norm.weight"].fill_(torch.nan), **unchecked), "model.norm.weight has NaN"),
        (lambda: rewrite(file, lambda t: t.update(extra=torch.ones(1))), "unexpected keys extra"),
        (lambda: rewrite(file, lambda t: None, crc32="["), "checksums are damaged"),
        (lambda: rewrite(file, lambda t: None, crc32="{}"), "has no checksum"),
        (lambda: say(lambda q: q.update(version=3)), "version 3 of the packed format"),
        (lambda: say(lambda q: q.update(quant_method="qqq")), "quant_method is 'qqq'"),
        (lambda: say(lambda q: q.pop("layout")), "'layout' is missing"),
        (lambda: say(lambda q: q.update(more=1)), "'more' is not known"),
        (lambda: say(lambda q: q["layers"].update({Q: 31})), "in_features=31"),
        (lambda: say(lambda q: q["layers"].update(none=31)), "'none', which is missing"),
        (lambda: config.write_text(said.replace("1e-05", "1e-04", 1)), "manifest is damaged"),
        (lambda: config.write_text("{"), "is not the config"),
        (lambda: file.write_bytes(whole[:-7]), "not a whole safetensors file"),
        (lambda: file.write_bytes(b""), "not a whole safetensors file"),
        (lambda: file.unlink(), "is missing"),
        (lambda: file.rename(file.with_name("packed.safetensors")), "version 1"),
    ]
    for damage, message in cases:
        file.write_bytes(whole)
        config.write_text(said)
        damage()
        with pytest.raises(ValueError, match=message) as caught:
            packed.load(tmp_path / "packed")
        assert "\n" not in str(caught.value)


# folders


def test_a_failed_write_leaves_nothing(tmp_path, llama):
    class Tokenizer:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    for write in (
        lambda: packed.save(llama, tmp_path / "x", None, Tokenizer()),
        lambda: hf.save(llama, tmp_path / "x", Tokenizer()),
    ):
        with pytest.raises(ValueError, match=f"cannot write {tmp_path / 'x'}.*No space left"):
            write()
        assert list(tmp_path.iterdir()) == []


def test_only_our_own_folder_is_replaced(tmp_path, llama):
    folder = packed.save(llama, tmp_path / "x")
    packed.save(llama, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="'notes.txt'"):
        packed.save(llama, folder)
    assert packed.is_packed(folder) and (folder / "notes.txt").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "a").touch()
    for target, message in ((foreign, "not empty"), (foreign / "a", "not a folder")):
        with pytest.raises(ValueError, match=message), new_folder(target):
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign", "x"]


# the stock transformers folder


def test_pack_rows_is_the_stock_packing():
    from transformers.integrations.bitnet import pack_weights

    codes = torch.randint(-1, 2, (12, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    assert torch.equal(pack_rows(codes), pack_weights(codes.clone()))  # the stock one changes its argument


@pytest.mark.parametrize(
    ("quant", "reason"),
    [
        ({"weight": "binary"}, "ternary weights only"),
        ({"granularity": "channel"}, "one scale a tensor"),
        ({"act_bits": None}, "act_bits=null"),
        ({"act_granularity": "tensor"}, "act_granularity=tensor"),
        ({"eps": 1e-6}, "quant.eps"),
    ],
)
def test_unsupported_quantization(tmp_path, quant, reason):
    model, _ = packed_model(**quant)
    assert reason in hf.unsupported(model)
    with pytest.raises(ValueError, match="hf format cannot hold"):
        hf.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_unsupported_models(llama):
    gpt2, _ = packed_model(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    assert "Conv1D" in hf.unsupported(gpt2)
    odd, _ = packed_model(LlamaConfig(**{**SMALL, "hidden_size": 30, "num_attention_heads": 2, "head_dim": 8}))
    assert "o_proj has out_features=30" in hf.unsupported(odd)
    plain = nn.Sequential(nn.Linear(8, 8))
    assert "no quantized layers" in hf.unsupported(plain)
    qat.convert(plain)
    assert "no transformers config" in hf.unsupported(plain)
    assert hf.unsupported(llama) is None


def normed_model(width=44):
    """Every layer norms its own input, by weights of its own."""
    model, record = packed_model(qwen2(intermediate_size=width), rms_norm_eps=0.01)
    for layer in packed_layers(model).values():
        nn.init.normal_(layer.rms_norm.weight, 1, 0.25)
    return model, record


def test_packed_layers_keep_their_norms(tmp_path):
    model, record = normed_model(43)
    folder = packed.save(model, tmp_path / "a", record)
    again = packed.load(folder)
    assert torch.equal(again(IDS[None, :64]).logits, model(IDS[None, :64]).logits)
    again.save_pretrained(tmp_path / "b")
    assert torch.equal(packed.load(tmp_path / "b")(IDS[None, :64]).logits, model(IDS[None, :64]).logits)
    assert packed.sizes(model)["packed_linears"] == packed.sizes(folder)["packed_linears"]
    rewrite(folder / "model.safetensors", lambda t: t.pop(f"{Q}.rms_norm.weight"))
    with pytest.raises(ValueError, match=f"no tensor {Q}.rms_norm.weight"):
        packed.load(folder)


@pytest.mark.parametrize("linear_class", hf.LINEAR_CLASSES)
def test_stock_layers_norm_their_input(tmp_path, in_process, linear_class):
    model, _ = normed_model()
    assert hf.unsupported(model) is None
    hf.save(model, tmp_path / "x", linear_class=linear_class)
    said = json.loads((tmp_path / "x/config.json").read_text())["quantization_config"]
    assert said["use_rms_norm"] is True and said["rms_norm_eps"] == 0.01
    assert verify(tmp_path / "x", model)["layers_difference"] < 1e-6
    rewrite(tmp_path / "x/model.safetensors", lambda t: t[f"{Q}.rms_norm.weight"][:8].mul_(2))
    with pytest.raises(ValueError, match="not the model that was packed: .*layers differ by"):
        verify(tmp_path / "x", model)


def test_norms_that_the_format_cannot_hold():
    assert "padding would change the mean that the norms" in hf.unsupported(normed_model(43)[0])
    model, _ = normed_model()
    qwen, _ = packed_model(qwen2(intermediate_size=44))
    model.model.layers[1].mlp.up_proj = qwen.model.layers[1].mlp.up_proj
    assert f"{Q} has rms_norm_eps=0.01 and model.layers.1.mlp.up_proj has None" in hf.unsupported(model)


def test_gguf_has_no_place_for_a_layer_s_norm():
    pytest.importorskip("gguf")
    reason = get_format("gguf").unsupported(normed_model()[0])
    assert reason == f"qwen2 in llama.cpp has no place for {Q}.rms_norm, the norm of this layer's own input"


def test_a_norm_outside_of_a_layer_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    attention = model.model.layers[0].self_attn
    attention.o_proj = nn.Sequential(nn.RMSNorm(32), attention.o_proj)
    qat.convert(model)
    qat.pack(model)
    assert "self_attn.o_proj.1 is missing in stock LlamaForCausalLM" in hf.unsupported(model)


def test_what_is_not_packed_yet_is_supported_but_not_saved(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    qat.convert(model)
    assert hf.unsupported(model) is None
    with pytest.raises(ValueError, match="call qat.pack first"):
        hf.save(model, tmp_path / "x")


def test_stock_subprocess_reads_padded_tied_llama(tmp_path, llama):
    card = {"base_model": "me/base", "license": "mit", "recipe": "quickstart", "results": {"full precision": 4.9}}
    info = hf.save(llama, tmp_path / "x", card=card, check=lambda new: hf.read_back(new, llama, IDS[:64][None], WINDOWS))
    found = info["verification"]
    assert found["layers_difference"] < 1e-6 and found["logits_difference"] < 5e-3 and found["perplexity_difference"] < 1e-4
    assert found["perplexity_bfloat16"] == pytest.approx(found["perplexity"], rel=0.02) and not found["bfloat16_cast"]
    config = json.loads((tmp_path / "x/config.json").read_text())
    assert config["dtype"] == "float32" and config["intermediate_size"] == 44 and "from 43 to 44" in info["padding"]
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    readme = (tmp_path / "x/README.md").read_text()
    assert readme.startswith("---\n") and 'base_model: "me/base"' in readme and "| full precision | 4.9 |" in readme
    assert "from 43 to 44" in readme and 'license: "mit"' in readme
    assert llama.config.intermediate_size == 43 and llama.config.quantization_config.quant_method == "qat"


def test_stock_subprocess_reads_qwen2_with_biases_as_autobitlinear(tmp_path, qwen):
    hf.save(qwen, tmp_path / "x", linear_class="autobitlinear")
    found = hf.read_back(tmp_path / "x", qwen, IDS[:64][None], WINDOWS)
    assert found["layers_difference"] < 1e-6 and found["logits_difference"] < 5e-3 and found["perplexity_difference"] < 1e-4
    assert found["bfloat16_cast"] == 1


def test_qwen2_with_biases_as_bitlinear(tmp_path, qwen, in_process):
    hf.save(qwen, tmp_path / "x")
    found = verify(tmp_path / "x", qwen)
    assert found["layers_difference"] < 1e-6 and found["perplexity_difference"] < 1e-4


def test_excluded_layers_and_rounded_scale(tmp_path, in_process):
    """An excluded gate_proj must be padded as well, and names must match no more than themselves."""
    names = ["model.layers.1.mlp.gate_proj", "*.0.self_attn.k_proj"]
    model, _ = packed_model(qwen2(), exclude=names, scale_dtype="bfloat16")
    hf.save(model, tmp_path / "x")
    kept = json.loads((tmp_path / "x/config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert sorted(kept) == ["lm_head", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.gate_proj"]
    assert load_file(tmp_path / "x/model.safetensors")["model.layers.1.mlp.gate_proj.weight"].shape == (44, 32)
    assert verify(tmp_path / "x", model)["layers_difference"] < 1e-6


def invert_scale(tensors):
    tensors[f"{Q}.weight_scale"] = 1 / tensors[f"{Q}.weight_scale"]


def permute_rows(tensors):
    tensors[f"{Q}.weight"][[0, 1]] = tensors[f"{Q}.weight"][[1, 0]]


def scale_bias(tensors):
    tensors[f"{Q}.bias"] *= tensors[f"{Q}.weight_scale"]


def flip_one_code(tensors):
    tensors[f"{Q}.weight"][0, 0] ^= 1


@pytest.mark.parametrize("fault", [invert_scale, permute_rows, scale_bias, flip_one_code])
def test_planted_faults_are_found(tmp_path, qwen, in_process, fault):
    hf.save(qwen, tmp_path / "x", linear_class="autobitlinear")
    rewrite(tmp_path / "x/model.safetensors", fault)
    with pytest.raises(ValueError, match="not the model that was packed: .*layers differ by"):
        verify(tmp_path / "x", qwen)


def test_a_failed_check_leaves_no_folder(tmp_path, llama):
    def fail(folder):
        assert (folder / "config.json").exists()
        raise ValueError("differs")

    with pytest.raises(ValueError, match="differs"):
        hf.save(llama, tmp_path / "x", check=fail)
    assert list(tmp_path.iterdir()) == []


# the verb


def test_formats():
    assert get_format("hf") is hf and list(FORMATS) == ["hf", "gguf", "pt2"]
    with pytest.raises(ValueError, match="choose one of hf, gguf, pt2"):
        get_format("onnx")


def test_errors_of_the_verb_are_one_line(capsys, tmp_path, llama):
    (tmp_path / "empty").mkdir()
    packed.save(packed_model(granularity="channel")[0], tmp_path / "channel")
    for run, message in (("none", "no such folder"), ("empty", "neither the folder of a finished run"), ("channel", "tokenizer")):
        assert verb.main([str(tmp_path / run), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("qat.export:") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_export_of_a_run(shared, capsys, tmp_path, monkeypatch):
    """Stories260k, converted without training: the verb writes, reads back in a subprocess, and prints both."""
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    source = shared / "models/stories260k"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    record = qat.convert(model)
    qat.pack(model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    packed.save(model, tmp_path / "run/packed", record, tokenizer, {"card": {"recipe": "stories260k"}})
    (tmp_path / "run/result.json").write_text(json.dumps({"perplexity": {"packed": 1500.0}}))
    text = str(shared / "data/tinystories/valid.txt")
    arguments = [str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--text", text, "--max-tokens", "4096"]
    assert verb.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "on the first 4,096 tokens of valid.txt: perplexity 1" in printed and "520,064 in bf16" in printed
    assert "the earlier export there is replaced" not in printed
    assert verb.main(arguments) == 0
    assert "the earlier export there is replaced\n" in capsys.readouterr().out
    readme = (tmp_path / "out/README.md").read_text()
    assert "| packed | 1500 |" in readme and "| recipe | stories260k |" in readme
