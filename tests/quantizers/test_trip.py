"""A contributor's trip with a new quantizer: its functions and one row, and it is trained, kept, packed, written and refused.

What a contribution touches are the file with the functions, the row in `qat/quantizers/__init__.py`, a row of tests/throwaway.py
(and with it every test of the whole table), and a line of the changelog. Here the functions and the row are in this file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from throwaway import THROWAWAY
from tiny import SIZES, packed_model
from torch import Tensor
from transformers import LlamaConfig

from qat import BitLinear, PackedBitLinear, QuantConfig
from qat.config import DataConfig, DistillConfig, ExportConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, TrainerConfig
from qat.config.compose.saved import load_config
from qat.conversion.layers import packed_layers
from qat.formats import get_format
from qat.formats.packed import folder as packed
from qat.ops import choice, cpu
from qat.quantizers import QUANTIZERS
from qat.quantizers.record import Parameter, Quantizer, WeightOptions
from qat.train import run
from qat.training.gradients.groups import parameter_groups


def initial(rows: Tensor, options: WeightOptions) -> Tensor:
    return rows.abs().mean(-1, keepdim=True)


def scale(rows: Tensor, options: WeightOptions, alpha: Tensor) -> Tensor:
    return alpha.abs()


def codes(rows: Tensor, scale: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(rows < 0, -1.0, 1.0)


def gradient(grad: Tensor, rows: Tensor, codes: Tensor, scale: Tensor, alpha: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Straight-through, clipped where |w| is above the scale; the scale's is that of codes * |alpha|."""
    return grad * (rows.abs() <= scale), {"alpha": (grad * codes * alpha.sign()).sum(-1, keepdim=True)}


ROW = Quantizer(
    levels=(-1, 1),
    codes=codes,
    scale=scale,
    gradient=gradient,
    parameters={"alpha": Parameter(initial)},
    packs_as=("binary", "ternary"),
    scales=("absmean",),
    granularities=("tensor", "channel"),
)


@pytest.fixture(autouse=True)
def _row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANTIZERS, "signed", ROW)


@pytest.fixture
def config(tiny_model: Path, text_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path=str(tiny_model)),
        quant=QuantConfig(weight="signed", granularity="channel"),
        data=DataConfig(train=str(text_file), sequence_length=32, batch_size=4, valid_fraction=0.1),
        distill=DistillConfig(ce=1, kl=0),
        optim=OptimConfig(lr=5e-3, warmup_steps=0, weight_decay=0.1),
        trainer=TrainerConfig(max_steps=4, accelerator="cpu", progress=False, threads=1, checkpoint_every=2),
        export=ExportConfig(formats=["hf", "pt2"]),
        run=RunConfig(name="signed", dir=str(tmp_path / "run")),
    )


def alphas(folder: Path) -> dict[str, Tensor]:
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("student."): value for name, value in state.items() if name.endswith(".alpha")}


def test_the_whole_trip(config: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    choice._say_once.cache_clear()
    result = run(config)
    folder = Path(result.folder)
    saved = json.loads((folder / "result.json").read_text())
    assert saved["perplexity"]["packed"] == saved["perplexity"]["trained"]
    assert saved["export"]["done"] == ["pt2"]
    reason = "quant.weight=signed, whose codes are -1, 1; the format holds ternary weights only"
    assert saved["export"]["skipped"]["hf"].endswith(reason)
    said = [line for line in capfd.readouterr().err.splitlines() if "quant.weight=signed" in line and "pure torch" in line]
    assert len(said) == cpu.compiled()

    kept, model = alphas(folder), packed.load(folder / "packed")
    assert len(kept) == 14 and all(value.shape[1] == 1 for value in kept.values())
    for name, layer in packed_layers(model).items():
        torch.testing.assert_close(layer.weight_scale, kept[f"{name}.alpha"].abs().clamp_min(1e-5), rtol=0, atol=0)
        assert set(layer.codes().unique().tolist()) == {-1, 1}

    again = load_config(str(folder))
    again.trainer.max_steps = 6
    assert run(again).status == "done"
    assert all(not torch.equal(value, kept[name]) for name, value in alphas(folder).items())


def test_learned_scales_are_a_group_of_the_optimizer_and_change(config: TrainConfig) -> None:
    layer = BitLinear(16, 8, config=config.quant)
    groups = {group["name"]: group for group in parameter_groups(torch.nn.Sequential(layer), config.optim)}
    assert list(groups) == ["latent", "vectors", "quantizers"]
    assert groups["quantizers"]["weight_decay"] == 0 and groups["latent"]["weight_decay"] == 0.1
    (alpha,) = groups["quantizers"]["params"]
    before, optimizer = alpha.detach().clone(), torch.optim.SGD(groups.values(), lr=0.1)
    assert torch.equal(before, layer.weight.abs().mean(1, keepdim=True))
    layer(torch.randn(5, 16)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(alpha, before)


def test_a_state_dict_brings_the_parameters(config: TrainConfig) -> None:
    layer, other = (BitLinear(16, 8, config=config.quant) for _ in range(2))
    with torch.no_grad():
        layer.alpha.mul_(-3)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({key: value for key, value in layer.state_dict().items() if key != "alpha"})


def test_what_the_row_does_not_allow_is_refused() -> None:
    with pytest.raises(ValueError, match="quant.granularity=group does not fit quant.weight=signed: only tensor and channel do"):
        QuantConfig(weight="signed", granularity="group", group_size=8)
    with pytest.raises(ValueError, match="quant.scale=absmax does not fit quant.weight=signed: only absmean does"):
        QuantConfig(weight="signed", scale="absmax")
    with pytest.raises(ValueError, match="quant.weight='sign' is not allowed; choose one of ternary, binary, .*signed"):
        QuantConfig(weight="sign")


def test_codes_that_nothing_holds_are_refused_before_training(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANTIZERS, "quad", THROWAWAY["quad"])
    config.quant = QuantConfig(weight="quad")
    with pytest.raises(ValueError, match="quant.weight=quad does not fit a run, which ends packed: its codes are -3, -1, 1, 3"):
        run(config)


def test_a_gguf_holds_its_codes() -> None:
    model = packed_model(LlamaConfig(**{**SIZES, "hidden_size": 256, "intermediate_size": 256}), weight="signed")
    assert get_format("gguf").unsupported(model) is None


def test_the_guides_quantizer_works_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/guides/quantizers.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    rows: dict[str, Quantizer] = {}
    exec(code, {"QUANTIZERS": rows, "Quantizer": Quantizer, "Parameter": Parameter})
    monkeypatch.setitem(QUANTIZERS, "learned", rows["learned"])
    layer, x = BitLinear(16, 8, config=QuantConfig(weight="learned")), torch.randn(5, 16)
    y = layer(x)
    y.square().sum().backward()
    assert layer.step.grad is not None and bool(layer.step.grad.any())
    clipped = layer.weight.abs() > layer.step
    assert 0 < clipped.sum() < clipped.numel() and not layer.weight.grad[clipped].any() and layer.weight.grad[~clipped].any()
    assert torch.equal(PackedBitLinear.from_bitlinear(layer)(x), y)
