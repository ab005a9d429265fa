"""Read a GGUF file back: every tensor exactly, the tokenizer, and the whole model in a real llama.cpp where one is installed.

The tensors are compared without llama.cpp: each, dequantized from the file, must be codes times float16 scale to the bit. Files
whose types the `gguf` package knows are also read by its stock reader, which must find the same shapes and bytes.

llama.cpp quantizes activations in its own blocks, so it cannot be the model as trained to the bit. It is therefore compared with
the packed model under those blocks (`gguf_activations`). What is left is float rounding, and what int8 makes of it: an input that
moves by less than an ulp can change a code. How far that carries depends on the model, so it is measured for each file: the same
model once more, its layers' inputs moved by float16's half unit. llama.cpp must be as near as LIMITS times that, or the floor
beside it, in logits (relative Frobenius norm of the difference, each position's mean taken off) and in perplexity (relative). How
far it is from the model as trained is reported.

Measured, logits: nine architectures of 2 to 7 layers, all types, 0.5 to 0.8 of the noise, which was 0.001 to 0.011; stories260k
0.004 for 0.007; SmolLM2-135M, converted and not trained, 0.015 to 0.019 for 0.055 (from the model as trained it is 0.12, for int8
per token suffers more from its outliers), and trained on 82 thousand tokens 0.0065 for 0.0065 (as trained 0.015). Perplexity: up
to 0.5 of the noise. Heads of q and k in the wrong order gave 0.46.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qat.formats.gguf import container as gguf_file
from qat.formats.gguf import i2s as gguf_i2s
from qat.formats.gguf import tensors as gguf_tensors
from qat.formats.gguf.activations import as_llama_cpp
from qat.formats.gguf.blocks import dequantize
from qat.formats.gguf.splits import surrounded
from qat.formats.gguf.tensors import I2S, Source
from qat.formats.llamacpp import ggml
from qat.formats.llamacpp import questions as llamacpp
from qat.metrics.agreement import beyond, relative_error
from qat.metrics.perplexity import Window, exp_mean, log_likelihood, logits_of

NOISE = 2.0**-11
LIMITS = {"logits": (2.0, 0.005), "perplexity": (2.0, 0.005)}
_GREEDY_PROMPT, _GREEDY_TOKENS = 16, 24
TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "The cat's toys aren't theirs; we've 3 of them, I'm sure!",
    "In 2024, 12345 people paid $1,234.56 (about 7%) for it.",
    "two  spaces,   three, and a trailing one ",
    "a line\nanother line\n\n  an indented one\twith a tab\n",
    'def f(x): return {"key": [x ** 2, x != 0]}  # code',
    "naïve café, Übergröße, Привет мир, 日本語のテキスト",
    "emoji 🙂 and symbols → ∑ ©",
    "ALL CAPS and CamelCase and snake_case_names",
    "https://example.org/a?b=c&d=%20#e",
)


def check_tensors(file: Path, sources: Iterable[Source], kind: str, floats: str) -> dict[str, Any]:
    """Compare every tensor of a file with the model's.

    Returns:
        {"tensors": how many were equal, "stock_reader": whether gguf's own reader knows the file's types and agrees}.

    Raises:
        ValueError: a tensor is missing, superfluous or differs; it is named.
    """
    read = gguf_file.read(file)
    seen = set()
    for source in sources:
        if source.name not in read.tensors:
            raise ValueError(f"{file.name} has no tensor {source.name}")
        found = read.float32(source.name, I2S.get(kind, "x86"))
        expected = _expected(source, kind, floats)
        if found.shape != expected.shape or not np.array_equal(found, expected):
            raise ValueError(f"tensor {source.name} was not read back as it was written")
        seen.add(source.name)
    if extra := sorted(set(read.tensors) - seen):
        raise ValueError(f"{file.name} has the unexpected tensor {extra[0]}")
    return {"tensors": len(seen), "stock_reader": _stock_agrees(file, read)}


def _expected(source: Source, kind: str, floats: str) -> NDArray[np.float32]:
    """What a reader must get: the packed layer's own numbers, with the scale in the precision of the file."""
    if source.codes is not None:
        assert source.scale is not None
        return dequantize(source.codes, source.scale if kind in I2S else source.half_scale())
    assert source.values is not None
    chosen = gguf_tensors.float_kind(source, floats)
    if chosen == "f32":
        return source.values
    tensor = gguf_tensors.to_tensor(source, chosen)
    if chosen == "q6_k" and llamacpp.version():
        return ggml.dequantize(tensor.data, "q6_K", source.values.size).reshape(source.values.shape)
    return gguf_file.GGUFFile({}, {source.name: tensor}).float32(source.name)


def _stock_agrees(file: Path, read: gguf_file.GGUFFile) -> bool:
    from gguf import GGMLQuantizationType, GGUFReader

    known = {int(number) for number in GGMLQuantizationType}
    if not all(tensor.kind in known for tensor in read.tensors.values()):
        return False
    stock = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for name, tensor in read.tensors.items():
        shape = tuple(int(width) for width in reversed(stock[name].shape.tolist()))
        if shape != tensor.shape or not np.array_equal(stock[name].data.reshape(-1).view(np.uint8), tensor.data):
            raise ValueError(f"gguf's own reader finds another {name}")
    return True


def check_tokenizer(file: Path, tokenizer: Any, kind: str) -> dict[str, Any]:
    """Compare llama.cpp's token ids with the tokenizer's; texts with characters that the vocabulary does not know are left out.

    Returns:
        {"texts": how many were equal}, or nothing where llama.cpp is not installed or cannot read the type.

    Raises:
        ValueError: the ids of a text differ.
    """
    if llamacpp.version() is None or kind in I2S:
        return {}
    level = "ByteLevel" in str(tokenizer.backend_tokenizer.pre_tokenizer)
    texts = [*TEXTS, *surrounded()] if level else list(TEXTS)  # where texts are split, all that a split treats apart
    wanted = {text: tokenizer(text).input_ids for text in texts}
    known = [text for text in texts if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in wanted[text]]
    for text, ids in zip(known, llamacpp.tokenize(file, known), strict=True):
        if ids != wanted[text]:
            raise ValueError(
                f"llama.cpp would read {text!r} as the tokens {ids}, but the model was trained with {wanted[text]};"
                " name the right text split by --pre-tokenizer"
            )
    return {"texts": len(known)}


def read_back(file: str | Path, model: nn.Module, probe_ids: Tensor, windows: Sequence[Window]) -> dict[str, Any]:
    """Run a file in llama.cpp and compare it with the packed model that it was written from.

    Args:
        probe_ids: int64 [B, T], tokens whose likeliest successors are compared.
        windows: of `qat.metrics.perplexity.windows`.

    Returns:
        {"llama_cpp": version of llama-cpp-python}; `perplexity` (in llama.cpp), `perplexity_packed` (as trained) and
        `perplexity_blocks` (in llama.cpp's blocks); `perplexity_difference` and `logits_difference` from the latter, and
        `logits_noise`, which says what is allowed;
        from the model as trained `logits_difference_packed`, `top1_difference_packed` (share of the probes' positions whose
        likeliest token is another) and `greedy_equal` of `greedy_tokens` (how many tokens of a greedy continuation are PyTorch's
        before the first that is not). Only {"llama_cpp": None, "why"} where it cannot be run.

    Raises:
        ValueError: llama.cpp refuses the file, or a difference is above what LIMITS allow; the numbers are named.
    """
    read = gguf_file.read(file)
    if gguf_i2s.NUMBER in {tensor.kind for tensor in read.tensors.values()}:
        return {"llama_cpp": None, "why": "I2_S runs in bitnet.cpp only, so the file was compared tensor by tensor and not run"}
    if llamacpp.version() is None:
        return {"llama_cpp": None, "why": f"llama-cpp-python is not installed ({llamacpp.INSTALL})"}
    windows = list(windows)
    prompt = probe_ids[0, :_GREEDY_PROMPT]
    answer = llamacpp.ask(
        file,
        {
            **llamacpp.window_request(windows),
            "probes": probe_ids.cpu().numpy(),
            "prompt": prompt.cpu().numpy(),
            "count": np.array(_GREEDY_TOKENS),
        },
    )
    nll, count = answer["nll"]
    blocks = as_llama_cpp(model, read)
    found: dict[str, Any] = {
        "llama_cpp": llamacpp.version(),
        "perplexity": exp_mean(float(nll), int(count)),
        "perplexity_packed": exp_mean(*log_likelihood(model, windows)),
        "perplexity_blocks": exp_mean(*log_likelihood(blocks, windows)),
        "greedy_equal": _equal_before(answer["continuation"].tolist(), greedy(model, prompt, _GREEDY_TOKENS)),
        "greedy_tokens": _GREEDY_TOKENS,
    }
    logits, packed = torch.from_numpy(answer["logits"]), _logits(model, probe_ids)
    expected, moved = (_logits(each, probe_ids) for each in (blocks, as_llama_cpp(model, read, NOISE)))
    found |= {
        "perplexity_difference": abs(found["perplexity"] / found["perplexity_blocks"] - 1),
        "logits_difference": _difference(logits, expected),
        "logits_noise": _difference(moved, expected),
        "logits_difference_packed": _difference(logits, packed),
        "top1_difference_packed": float((logits.argmax(-1) != packed.argmax(-1)).double().mean()),
    }
    _assert_near(found)
    return found


def _assert_near(found: dict[str, Any]) -> None:
    allowed = {what: max(times * found["logits_noise"], floor) for what, (times, floor) in LIMITS.items()}
    wrong = [f"{what} {how}" for what, how in beyond(found, allowed).items()]
    if wrong:
        numbers = f"perplexity {found['perplexity']:.6g} in llama.cpp, {found['perplexity_blocks']:.6g} packed"
        raise ValueError(f"llama.cpp computes another model from the file than was packed: {', '.join(wrong)}; {numbers}")


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return logits_of(model, ids).float().cpu()


@torch.no_grad()
def greedy(model: nn.Module, prompt: Tensor, count: int) -> list[int]:
    """The `count` likeliest next tokens of PyTorch's model, one after another, without a cache."""
    ids = prompt[None]
    for _ in range(count):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt) :].tolist()


def _difference(read: Tensor, ours: Tensor) -> float:
    """Of logits, after each position's mean is taken off, which no probability depends on."""
    return relative_error(*(logits - logits.mean(-1, keepdim=True) for logits in (read, ours)))


def _equal_before(first: list[int], second: list[int]) -> int:
    differing = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    return differing[0] if differing else len(first)


def report(info: Mapping[str, Any]) -> list[str]:
    """Lines for people about what `qat.formats.gguf.writing.save` returned."""
    padding = [info["padding"]] if "padding" in info else []
    return [f"wrote {info['file']} ({info['bytes']:,} bytes)", *info["types"], *padding, *comparisons(info)]


def comparisons(info: Mapping[str, Any]) -> list[str]:
    """Those of the lines that say what was compared."""
    found, lines = info["verification"], []
    if info["scale_rounding"]:
        share = f"{info['scale_rounding']:.1e}"
        lines.append(f"scales were rounded to float16, by at most {share}; training with quant.scale_dtype=float16 avoids it")
    stock = ", by gguf's own reader too" if found["stock_reader"] else ""
    lines.append(f"read back: {found['tensors']} tensors are codes times scales to the bit{stock}")
    if found.get("llama_cpp") is None:
        return [*lines, f"not run in llama.cpp: {found['why']}"] if "why" in found else lines
    if "texts" in found:
        lines.append(f"llama.cpp reads {found['texts']} texts as the same tokens")
    return [
        *lines,
        f"llama.cpp (llama-cpp-python {found['llama_cpp']}): perplexity {found['perplexity']:.6g}, in PyTorch with its"
        f" activation blocks {found['perplexity_blocks']:.6g} (relative difference {found['perplexity_difference']:.1e},"
        f" of logits {found['logits_difference']:.1e} where float16's rounding makes {found['logits_noise']:.1e})",
        f"from the model as trained, perplexity {found['perplexity_packed']:.6g}: logits differ by"
        f" {found['logits_difference_packed']:.1e}, likeliest tokens at {found['top1_difference_packed']:.1%} of positions;"
        f" a greedy continuation is equal for {found['greedy_equal']} of {found['greedy_tokens']} tokens",
    ]


def recorded(info: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What a run notes of it: facts for its result, and lines for people."""
    facts = {key: info[key] for key in ("types", "scale_rounding", "verification")}
    return facts, [f"{Path(info['file']).name}: {line}" for line in comparisons(info)]
