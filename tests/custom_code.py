"""A model with code of its own beside its weights, as hubs have them: a configuration, a model, and a file that both import."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

_FILES = {
    "sizes_tinyx.py": "WIDTH = 32\n",
    "configuration_tinyx.py": """
from transformers import LlamaConfig

from .sizes_tinyx import WIDTH


class TinyXConfig(LlamaConfig):
    model_type = "tinyx"

    def __init__(self, twist=2.0, **kwargs):
        kwargs.setdefault("hidden_size", WIDTH)
        super().__init__(**kwargs)
        self.twist = twist
""",
    "modeling_tinyx.py": """
import os

from transformers import LlamaForCausalLM
from .configuration_tinyx import TinyXConfig

if os.environ.get("QAT_TEST_CODE_RAN"):
    open(os.environ["QAT_TEST_CODE_RAN"], "w").close()


class TinyXForCausalLM(LlamaForCausalLM):
    config_class = TinyXConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * self.config.twist
        return found
""",
}
AUTO_MAP = {"AutoConfig": "configuration_tinyx.TinyXConfig", "AutoModelForCausalLM": "modeling_tinyx.TinyXForCausalLM"}


def write(folder: Path, like: Path) -> Path:
    """Turn the Llama of the folder `like`, with its tokenizer, into such a model; its logits are twice the Llama's."""
    shutil.copytree(like, folder)
    for name, text in _FILES.items():
        (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    about = {"model_type": "tinyx", "architectures": ["TinyXForCausalLM"], "auto_map": AUTO_MAP, "twist": 2.0}
    (folder / "config.json").write_text(json.dumps(config | about))
    return folder
