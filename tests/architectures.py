"""Small random models of each architecture, what qat does with them, and the table of it in docs/.

`python tests/architectures.py` writes the table; `formats/test_architectures.py` fails where it is not current. A cell says
yes only after a round trip: the converted model trains every latent weight, the packed one gives the same logits to the bit, the
folder is written and read back. What is refused has its reason, in the words that a user reads.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch._dynamo
from torch import Tensor, nn

import qat
from qat.conversion.layers import bitlinears, set_lambda
from qat.formats import FORMATS, get_format
from qat.formats.bitnet import writing as hf
from qat.formats.packed import folder as packed

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "architectures.md"
BEGIN, END = "<!-- architectures: python tests/architectures.py -->", "<!-- /architectures -->"

DECODER = {
    "vocab_size": 32,
    "hidden_size": 64,  # multiples of 64, which blocks of GGUF ask for
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD_DIM = {**DECODER, "head_dim": 32}
GEMMA = {**HEAD_DIM, "query_pre_attn_scalar": 32}
ONE_KIND_OF_HEAD = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
ENCODER = {key: DECODER[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
MOE = {**DECODER, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_experts": 4}
SHARED = {**MOE, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1}
GPT2 = {"vocab_size": 32, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 32, "d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}


@dataclass(frozen=True)
class Architecture:
    """Class names in transformers, a small config, and how many layers of the model are converted."""

    config: str
    model: str
    settings: dict[str, object]
    layers: int
    exclude: str | None = None

    def build(self) -> nn.Module:
        """Random, with biases that are not zero."""
        import transformers

        torch.manual_seed(0)
        model = getattr(transformers, self.model)(getattr(transformers, self.config)(**self.settings)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
        return model


ARCHITECTURES = {
    "Llama": Architecture("LlamaConfig", "LlamaForCausalLM", DECODER, 14),
    "Mistral": Architecture("MistralConfig", "MistralForCausalLM", HEAD_DIM, 14),
    "Qwen2 (biases)": Architecture("Qwen2Config", "Qwen2ForCausalLM", {**DECODER, "tie_word_embeddings": True}, 14),
    "Qwen3 (query and key norms)": Architecture("Qwen3Config", "Qwen3ForCausalLM", HEAD_DIM, 14),
    "Gemma (scaled embeddings)": Architecture("GemmaConfig", "GemmaForCausalLM", HEAD_DIM, 14),
    "Gemma 2": Architecture("Gemma2Config", "Gemma2ForCausalLM", GEMMA, 14),
    "Gemma 3": Architecture("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA, 14),
    "Phi": Architecture("PhiConfig", "PhiForCausalLM", DECODER, 12),
    "BitNet b1.58 (sub-norms)": Architecture("BitNetConfig", "BitNetForCausalLM", DECODER, 14),
    "GPT-2 (Conv1D)": Architecture("GPT2Config", "GPT2LMHeadModel", GPT2, 8),
    "GPT-NeoX (parallel residual)": Architecture("GPTNeoXConfig", "GPTNeoXForCausalLM", ONE_KIND_OF_HEAD, 8),
    "Mixtral": Architecture(
        "MixtralConfig", "MixtralForCausalLM", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}, 0
    ),
    "Mixtral, experts excluded": Architecture(
        "MixtralConfig", "MixtralForCausalLM", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}, 8, "*experts"
    ),
    "Qwen2-MoE, experts excluded": Architecture("Qwen2MoeConfig", "Qwen2MoeForCausalLM", SHARED, 14, "*experts"),
    "Qwen3-MoE, experts excluded": Architecture("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**MOE, "head_dim": 32}, 8, "*experts"),
    "BERT": Architecture("BertConfig", "BertForMaskedLM", {**ENCODER, "vocab_size": 32, "max_position_embeddings": 16}, 13),
    "ViT": Architecture(
        "ViTConfig", "ViTForImageClassification", {**ENCODER, "image_size": 8, "patch_size": 4, "num_labels": 3}, 12
    ),
    "T5": Architecture("T5Config", "T5ForConditionalGeneration", T5, 32),
}


def logits(model: nn.Module) -> Tensor:
    """Of fixed random inputs."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return model(pixel_values=torch.randn(2, 3, 8, 8, generator=generator)).logits
    ids = torch.randint(1, 32, (2, 8), generator=generator)
    return model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})).logits


class Refused(Exception):
    """With the reason."""


@dataclass
class Row:
    """One architecture on its way through qat; a cell that fails leaves what follows it empty."""

    architecture: Architecture
    folder: Path
    model: nn.Module = field(init=False)
    trained: Tensor = field(init=False)

    def convert(self) -> str:
        self.model = self.architecture.build()
        full = logits(self.model).detach()
        try:
            record = qat.convert(self.model, exclude=self.architecture.exclude)
        except ValueError as error:
            raise Refused(str(error)) from error
        assert len(record.converted) == self.architecture.layers, record.summary()
        set_lambda(self.model, 0)
        torch.testing.assert_close(logits(self.model), full)
        set_lambda(self.model, 1)
        return f"{len(record.converted)} layers"

    def train(self) -> str:
        """One step moves every latent weight."""
        before = {name: layer.weight.detach().clone() for name, layer in bitlinears(self.model)}
        full = logits(self.model).detach()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        logits(self.model).log_softmax(-1)[..., 0].sum().neg().backward()
        assert [name for name, layer in bitlinears(self.model) if not layer.weight.grad.any()] == []
        optimizer.step()
        assert [name for name, layer in bitlinears(self.model) if torch.equal(layer.weight, before[name])] == []
        with torch.no_grad():  # with gradients, attention takes another path and rounds otherwise
            self.trained = logits(self.model)
        assert self.trained.isfinite().all() and (self.trained - full).abs().max() > 1e-4
        return "yes"

    def pack(self) -> str:
        qat.pack(self.model)
        assert torch.equal(logits(self.model), self.trained)
        return "yes"

    def qat_folder(self) -> str:
        """By transformers' own `save_pretrained` and `from_pretrained`, and by ours."""
        self.model.save_pretrained(self.folder / "theirs")
        packed.save(self.model, self.folder / "ours")
        for folder in (self.folder / "theirs", self.folder / "ours"):
            assert torch.equal(logits(type(self.model).from_pretrained(folder)), self.trained)
            assert torch.equal(logits(packed.load(folder)), self.trained)
        return "yes"

    def stock_folder(self) -> str:
        """Read by stock transformers' layers (in this process: the subprocess of `verify` costs seconds)."""
        if reason := hf.unsupported(self.model):
            raise Refused(reason)
        hf.save(self.model, self.folder / "stock")
        with torch._dynamo.config.patch(disable=True):
            again, report = type(self.model).from_pretrained(self.folder / "stock", output_loading_info=True)
            assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            torch.testing.assert_close(logits(again), self.trained, atol=2e-3, rtol=2e-3)
        return "yes"

    def gguf_file(self) -> str:
        """Its writer compares every tensor of what it wrote with the model's."""
        writer = get_format("gguf")
        if reason := writer.unsupported(self.model):
            raise Refused(reason)
        writer.save(self.model, self.folder / "model.gguf")
        return "yes"

    def cells(self) -> list[str]:
        """One a column; ValueError or AssertionError for a step that neither works nor says why not."""
        found: list[str] = []
        for column, step in COLUMNS.items():
            try:
                with torch.set_grad_enabled(column == "train"):
                    found.append(step(self))
            except Refused as error:
                found.append(f"refused: {error}")
                if column == "convert":
                    break
        return found + [""] * (len(COLUMNS) - len(found))


COLUMNS: dict[str, Callable[[Row], str]] = {
    "convert": Row.convert,
    "train": Row.train,
    "pack": Row.pack,
    "`import qat` folder": Row.qat_folder,
    "stock HF folder": Row.stock_folder,
}


if "gguf" in FORMATS:
    COLUMNS["GGUF"] = Row.gguf_file


def table(rows: dict[str, list[str]]) -> str:
    """Markdown; what was refused is numbered, with the reasons below."""
    reasons: dict[str, int] = {}
    lines = [f"| architecture | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, cells in rows.items():
        shown = []
        for cell in cells:
            if cell.startswith("refused: "):
                number = reasons.setdefault(cell.removeprefix("refused: "), len(reasons) + 1)
                cell = f"refused [{number}]"
            shown.append(cell)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes])


def measure() -> dict[str, list[str]]:
    """Every row, anew."""
    with tempfile.TemporaryDirectory() as scratch:
        return {name: Row(a, Path(scratch, str(i))).cells() for i, (name, a) in enumerate(ARCHITECTURES.items())}


def in_page() -> str:
    """The table as it stands in the page."""
    return _parts()[1]


def write() -> None:
    """Measure, and put the table into the page."""
    before, _, after = _parts()
    PAGE.write_text(f"{before}{table(measure())}{after}", encoding="utf-8")


def _parts() -> tuple[str, str, str]:
    found = re.fullmatch(f"(.*{re.escape(BEGIN)}\n)(.*)(\n{re.escape(END)}.*)", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert found, f"{PAGE.name} has no section between {BEGIN} and {END}"
    return found[1], found[2], found[3]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    write()
    print(in_page())
