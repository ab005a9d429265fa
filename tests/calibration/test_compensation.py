"""Models calibrated without training: every layer packed, nearer to full precision, whatever the architecture."""

import copy

import pytest
import torch
from tiny import SIZES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

import qat
from qat.calibration.compensation import check_calibrated, compensate
from qat.metrics.agreement import relative_error

GENERATOR = torch.Generator().manual_seed(0)
WINDOWS = [torch.randint(32, (4, 40), generator=GENERATOR) for _ in range(4)]


def pair(config: object, **quant: object) -> tuple[nn.Module, nn.Module]:
    """A model in full precision, and its converted copy."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in base.named_parameters():
        if name.endswith("bias") or parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    model = copy.deepcopy(base)
    qat.convert(model, qat.QuantConfig(**quant))
    return base, model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.cat(WINDOWS[:1]), use_cache=False).logits


@pytest.mark.parametrize(
    "config, quant",
    [
        (LlamaConfig(**SIZES), {}),
        (LlamaConfig(**SIZES), {"granularity": "channel"}),
        (LlamaConfig(**SIZES), {"granularity": "channel", "act_bits": None, "weight": "binary"}),
        (LlamaConfig(**SIZES), {"granularity": "group", "group_size": 4}),
        (LlamaConfig(**SIZES), {"components": 2}),
        (LlamaConfig(**SIZES), {"granularity": "channel", "rms_norm_eps": 1e-6}),
        (GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=64), {"granularity": "channel"}),
        (GPTNeoXConfig(**SIZES, rotary_pct=0.5), {"granularity": "channel"}),
    ],
    ids=["tensor", "channel", "binary", "group", "two components", "subln", "gpt2", "gpt_neox"],
)
def test_outputs_come_nearer_to_full_precision(config, quant):
    base, model = pair(config, **quant)
    plain = copy.deepcopy(model)
    qat.pack(plain)
    names = [name for name, module in plain.named_modules() if isinstance(module, qat.PackedBitLinear)]
    wanted = logits(base)
    found = compensate(base, model, WINDOWS)
    assert [name for name, module in model.named_modules() if isinstance(module, qat.PackedBitLinear)] == names
    assert sorted(found.errors) == sorted(names) and found.tokens == 640 and not found.unseen and not found.alone
    assert relative_error(logits(model), wanted) < 0.85 * relative_error(logits(plain), wanted)
    assert torch.equal(logits(base), wanted)  # which was left as it was


def test_a_ternary_model_is_found_again():
    """Codes and scales to the bit; so nothing drifts and every error is that of the activations' rounding."""
    base, model = pair(LlamaConfig(**SIZES), granularity="channel", act_bits=None)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, qat.BitLinear):
                codes, scale = layer.quantized()
                layer.weight.copy_(codes * scale)
                base.get_submodule(name).weight.copy_(codes * scale)
    truth = {name: layer.weight.clone() for name, layer in model.named_modules() if isinstance(layer, qat.BitLinear)}
    compensate(base, model, WINDOWS)
    for name, weight in truth.items():
        assert torch.allclose(model.get_submodule(name).dequantize(), weight, rtol=1e-4, atol=0)


def test_reading_the_residual_makes_good_for_drift(monkeypatch):
    """Seen to matter: without the streams that outputs are added to, the logits are further away."""
    errors = []
    for follow in (True, False):
        if not follow:
            monkeypatch.setattr("qat.calibration.recorder.Recorder._added", lambda *_: (None, None))
        base, model = pair(LlamaConfig(**SIZES), granularity="channel")
        compensate(base, model, WINDOWS)
        errors.append(relative_error(logits(model), logits(base)))
    assert errors[0] < errors[1]


def test_what_cannot_be_calibrated_is_said():
    base, model = pair(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="no BitLinear layer to calibrate"):
        compensate(base, base, WINDOWS)
    model.model.layers[0].mlp.down_proj.weight.data.fill_(3e38).mul_(10)
    with pytest.raises(ValueError, match="down_proj: its inputs on the calibration text are not finite"):
        compensate(base, model, WINDOWS)


@pytest.mark.parametrize(
    "weight, why", [("lsq", "its step, unit must be trained"), ("sherry", "4 at a time"), ("tequila", "add to the bias")]
)
def test_quantizers_whose_codes_are_not_free_are_refused(weight, why):
    with pytest.raises(ValueError, match=f"quant.weight={weight} cannot be calibrated without training: .*{why}"):
        check_calibrated(qat.QuantConfig(weight=weight))


class Expert(nn.Module):
    """A block of two layers of which each sees the tokens that a router sends there."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(32, 16), nn.Linear(16, 3)
        self.experts, self.head = nn.ModuleList(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 32)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids).flatten(0, 1)
        choice = self.router(x)[:, :2].argmax(-1)  # the third is never called
        y = x.clone()
        for i, expert in enumerate(self.experts):
            if (choice == i).any():
                y[choice == i] += expert(x[choice == i])
        return self.head(y).unflatten(0, input_ids.shape)


def test_experts_are_fitted_to_the_tokens_that_they_see():
    torch.manual_seed(0)
    base = Expert().eval()
    model = copy.deepcopy(base)
    qat.convert(model, qat.QuantConfig(granularity="channel"), include=["experts.*"])
    plain = copy.deepcopy(model)
    qat.pack(plain)
    found = compensate(base, model, WINDOWS)
    assert found.alone == ["experts.0", "experts.1"] and found.unseen == ["experts.2"]
    assert torch.equal(model.experts[2].codes(), plain.experts[2].codes())
    ids = WINDOWS[0]
    with torch.no_grad():
        assert relative_error(model(ids), base(ids)) < relative_error(plain(ids), base(ids))
