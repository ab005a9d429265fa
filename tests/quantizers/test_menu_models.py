"""The menu's rows in models: packed and read back, trained by a run, annealed, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_checks import same
from tiny import SIZES, Model
from transformers import LlamaConfig, LlamaForCausalLM

import qat
from qat import QuantConfig
from qat.config import DataConfig, DistillConfig, ExportConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, TrainerConfig
from qat.conversion import layers
from qat.formats.bitnet import limits
from qat.formats.dtypes import round_floats
from qat.formats.gguf import writing as gguf
from qat.formats.packed import folder as packed
from qat.quantizers.menu import ROWS
from qat.train import run


@pytest.mark.parametrize("weight", ["tequila", "uniform4", "seq2", "sherry"])
def test_a_model_packs_and_is_read_back(weight: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    qat.convert(model, QuantConfig(weight=weight, granularity="channel"))
    ids = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    round_floats(model, "bfloat16")
    trained = model(input_ids=ids).logits
    qat.pack(model, layout="base3")
    same(model(input_ids=ids).logits, trained)
    packed.save(model, tmp_path / "packed", floats="bfloat16")
    same(packed.load(tmp_path / "packed")(input_ids=ids).logits, trained)


def test_formats_without_room_say_so() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    qat.convert(model, QuantConfig(weight="uniform4"))
    assert "quant.weight=uniform4, a sum of 3 ternary matrices; the format holds one a layer" in str(limits.unsupported(model))
    assert "is a sum of 3 ternary matrices (quant.weight=uniform4); a block holds one" in str(gguf.unsupported(model))
    other = LlamaForCausalLM(LlamaConfig(**SIZES))
    qat.convert(other, QuantConfig(weight="tequila"))
    for found in (limits.unsupported(other), gguf.unsupported(other)):
        assert "quant.weight=tequila gives it a bias" in str(found)


@pytest.mark.parametrize(
    ("weight", "formats", "message"),
    [
        ("uniform3", ["hf"], "export.formats=hf does not fit quant.weight=uniform3: a weight is a sum of 2 matrices of codes"),
        ("seq2", ["pt2", "gguf"], "export.formats=gguf does not fit quant.weight=seq2: .* no room for planes; take pt2, or"),
        ("tequila", ["gguf"], "export.formats=gguf does not fit quant.weight=tequila: every layer gets a bias.* for biases"),
    ],
)
def test_exports_that_cannot_be_are_refused_before_training(weight: str, formats: list[str], message: str) -> None:
    quant = QuantConfig(weight=weight, granularity="channel")
    config = TrainConfig(model=ModelConfig(path="none"), quant=quant, export=ExportConfig(formats=formats))
    with pytest.raises(ValueError, match=message):
        config.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "uniform3", "components": 2}, "quant.weight=uniform3 does not fit quant.components=2: components"),
        ({"weight": "twn", "components": 2}, "quant.weight=twn does not fit quant.components=2: components are ternary"),
        ({"weight": "twn", "scale_multiplier": 1.25}, "quant.scale_multiplier=1.25 does not fit quant.weight=twn"),
        ({"weight": "twn", "scale": "absmax"}, "quant.scale=absmax does not fit quant.weight=twn: its threshold"),
        ({"weight": "seq"}, "quant.granularity=tensor does not fit quant.weight=seq: its range is learned"),
        ({"weight": "uniform2", "backward": "int8"}, "quant.backward=int8 does not fit quant.weight=uniform2"),
    ],
)
def test_what_does_not_combine_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", ["seq2", "tequila", "ternary_threshold"])
def test_a_run_trains_its_parameters_and_packs_what_it_trained(
    weight: str, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        model=ModelConfig(path=str(tiny_model)),
        quant=QuantConfig(weight=weight, granularity="channel"),
        data=DataConfig(train=str(text_file), sequence_length=32, batch_size=4, valid_fraction=0.1),
        distill=DistillConfig(ce=1, kl=0),
        optim=OptimConfig(lr=5e-3, warmup_steps=0),
        trainer=TrainerConfig(max_steps=3, accelerator="cpu", progress=False, threads=1, checkpoint_every=3),
        export=ExportConfig(formats=[]),
        run=RunConfig(name=weight, dir=str(tmp_path / "run")),
    )
    found = run(config).perplexity
    assert found["packed"] == found["trained"] != found["converted"]
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name in (name for name, one in ROWS[weight].parameters.items() if one.trained):
        values = [value for key, value in state.items() if key.endswith(f".{name}")]
        assert len(values) == 14 and all(len(value.unique()) > 1 for value in values)


def test_annealing_serves_rows_with_a_soft_form_or_a_gradient_that_sharpens() -> None:
    for weight in ("sherry", "ternary_clipped"):
        with pytest.raises(ValueError, match=f"optim.anneal=soft does not fit quant.weight={weight}, which has no soft form"):
            annealed(weight).check()
    annealed("ternary_sharpened").check()
    model = Model()
    qat.convert(model, QuantConfig(weight="ternary_sharpened"))
    layers.set_beta(model, 3.0)
    found = [layer.sharpness.tolist() for _, layer in layers.bitlinears(model)]
    assert found == [[3.0]] * len(found) and len(found) == 4


def annealed(weight: str) -> TrainConfig:
    data, optim = DataConfig(train="some/texts"), OptimConfig(anneal="soft")
    return TrainConfig(model=ModelConfig(path="some/model"), quant=QuantConfig(weight=weight), data=data, optim=optim)
