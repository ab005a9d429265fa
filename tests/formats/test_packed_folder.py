"""Our own folder: round trips, what is refused, damaged files, and what is left where a write fails."""

import json

import pytest
import torch
from folder_samples import IDS, Q, normed_model, packed_model, qwen2, rewrite
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import qat
from qat.formats.bitnet import writing as hf
from qat.formats.folder import new_folder
from qat.formats.packed import folder as packed
from qat.formats.packed.manifest import parse, sealed
from qat.formats.seal import SUMS


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
