"""The learning rate at which a model of some size is fine-tuned in full precision, of which a recipe's rate is a multiple.

    rate(N) = 5e-4 (N / 10^7)^-0.7 for N parameters, at most 5e-4 and at least 2e-5

which is 5e-4 to 10 million parameters, 1e-4 near 100 million (8e-5 for 135) and 2e-5 from a billion on, where language models are
commonly fine-tuned at 1e-5 to 5e-5. Latent weights want several times as much, as a step that moves no code changes nothing:
measured, 6 times for 0.26 million parameters (recipes/stories260k.yaml), and 5 times is what Hugging Face took for 8 billion
("Fine-tuning LLMs to 1.58bit", 2024: 1e-4). A rule that is wrong by two is still a better start than one number for all sizes.
"""

from __future__ import annotations

from dataclasses import replace

from qat.config import TrainConfig

HIGHEST, LOWEST = 5e-4, 2e-5
SMALL = 1e7
"""Parameters up to which the highest is taken."""
POWER = 0.7


def fine_tuning_rate(parameters: int) -> float:
    """A peak rate of AdamW for full-precision fine-tuning, to two digits."""
    rate = HIGHEST * (max(parameters, SMALL) / SMALL) ** -POWER
    return float(f"{max(rate, LOWEST):.1e}")


def rated(config: TrainConfig, parameters: int) -> TrainConfig:
    """The configuration with a learning rate, where it has only a multiple of one."""
    if config.optim.lr is not None:
        return config
    rate = config.optim.lr_multiple * fine_tuning_rate(parameters)
    return replace(config, optim=replace(config.optim, lr=float(f"{rate:.3g}")))


def in_words(config: TrainConfig, parameters: int) -> str:
    """`optim.lr=0.003, 6 times 0.0005: ...`."""
    base = fine_tuning_rate(parameters)
    about = f"at which {parameters:,} parameters are fine-tuned in full precision"
    return f"optim.lr={config.optim.peak:g}, {config.optim.peak / base:.3g} times {base:g}, {about}"
