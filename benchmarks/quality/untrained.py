"""Post-training points beside the study's rows: torchao's weights of 4, 3 and 2 bits in groups, activations in floating point.

python -m benchmarks.quality.untrained ../shared/models/stories260k ../shared/data/tinystories/valid.txt --out runs/quality
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import IntxChooseQParamsAlgorithm
from transformers import PreTrainedModel

from benchmarks.quality.table import UNTRAINED
from qat.config import ModelConfig
from qat.metrics.perplexity import perplexity
from qat.models.hub import load_model
from qat.models.tokenizer import load_tokenizer

GROUP = 32
ROUNDINGS = {"nearest": IntxChooseQParamsAlgorithm.AFFINE, "HQQ": IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY}


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """All linear layers but the head, as the study converts them."""
    head = model.get_output_embeddings()
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}


def group(k: int) -> int:
    """The divisor of a layer's inputs that is nearest to GROUP."""
    return min((size for size in range(1, k + 1) if k % size == 0), key=lambda size: abs(size - GROUP))


def quantized(model: PreTrainedModel, bits: int, rounding: IntxChooseQParamsAlgorithm) -> int:
    """Round the layers in place; their bytes: codes, and a float16 scale a group."""
    layers = linears(model)
    for size in {group(layer.in_features) for layer in layers.values()}:
        chosen = {name for name, layer in layers.items() if group(layer.in_features) == size}
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerGroup(size),
            mapping_type=MappingType.SYMMETRIC,
            intx_choose_qparams_algorithm=rounding,
        )
        quantize_(model, config, filter_fn=lambda _, name, chosen=chosen: name in chosen)
    weights = [(layer.out_features * layer.in_features, group(layer.in_features)) for layer in layers.values()]
    return sum(count * bits // 8 + count // size * 2 for count, size in weights)


def main() -> None:
    """Measure each number of bits under each rounding, print a table and write what the picture reads."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.untrained", description=main.__doc__)
    parser.add_argument("model", help="as model.path")
    parser.add_argument("text", type=Path, help="what perplexity is measured on")
    parser.add_argument("--context", type=int, default=512, help="and stride, in tokens (default: 512)")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="the study's folder (default: runs/quality)")
    asked = parser.parse_args()
    try:
        run(asked)
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmarks.quality.untrained: {error}") from error


def run(asked: argparse.Namespace) -> None:
    """All of it. Raises ValueError or OSError for a model or text that cannot be read."""
    config = ModelConfig(path=asked.model)
    tokens = torch.tensor(load_tokenizer(config)(asked.text.read_text(encoding="utf-8"))["input_ids"])
    found = []
    print("| weights | perplexity | linear layers, bytes |\n|---|---:|---:|")
    for bits in (4, 3, 2):
        for name, rounding in ROUNDINGS.items():
            model = load_model(config)
            size = quantized(model, bits, rounding)
            value = perplexity(model, tokens, context=asked.context)
            print(f"| {bits} bits, groups of about {GROUP}, {name} | {value:.3f} | {size:,} |", flush=True)
            found.append({"row": f"{bits} bits, {name}", "of": "post-training", "bytes": size, "perplexity": value})
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / UNTRAINED).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
