"""README.md of a run's folder, which is the model card of what it wrote: made of its result, whether it is published or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.config import TrainConfig
from qat.formats import card
from qat.models import hub as models
from qat.reporting.result import RunResult, Stages
from qat.reporting.table import STAGES
from qat.storage import write_text
from qat.targets import FORMATS

CARD = "README.md"
PACKED = "packed"


def files(folder: Path, result: RunResult) -> dict[Path, str]:
    """What a run wrote to be used -> its place in a repository; a folder's place is '' for the root.

    Stock transformers finds a model at the root, so the folder that it reads lies there; without one our own does.
    """
    done = [FORMATS[name] for name in result.export.get("done", [])]
    folders = [folder / one.in_run for one in done if not one.suffix]
    packed = {folder / PACKED: PACKED if folders else ""}
    return {**dict.fromkeys(folders, ""), **packed, **{folder / one.in_run: one.in_run for one in done if one.suffix}}


def write_card(config: TrainConfig, folder: Path, result: RunResult) -> Path:
    """Write the card; where the run is to be pushed it says how to load what lies there."""
    repo = config.export.push_to_hub
    sections = {"Verification": _list(result.verification.get("summary", [])), **_loading(config, folder, result, repo)}
    about = {"weights trained": result.weights} if result.weights else {}
    text = card.written(
        _facts(config, result, repo), config.quant, about, {name: said for name, said in sections.items() if said}
    )
    write_text(folder / CARD, text)
    return folder / CARD


def _facts(config: TrainConfig, result: RunResult, repo: str | None) -> dict[str, Any]:
    texts = [result.measured, *result.further.values()]
    return {
        **models.describe_source(config.model),
        "recipe": config.run.name,
        "name": repo.partition("/")[2] if repo else config.run.name,
        "task": config.task,
        "results": {key: value for text in texts for key, value in _results(text).items()} | _sizes(result.bytes),
        "evaluated": [
            {"text": text.text, "measure": text.measure, "value": float(text[stage])}
            for text in texts
            if (stage := next((one for one in ("exported", "packed") if one in text), None))
        ],
    }


def _results(text: Stages) -> dict[str, str]:
    return {f"{text.words} on {text.text}: {STAGES[stage]}": text.shown(text[stage]) for stage in STAGES if stage in text}


def _sizes(sizes: Mapping[str, int]) -> dict[str, str]:
    names = {"full_precision_bf16": "bytes of the whole model in bf16", "packed_model": "bytes, packed"}
    return {words: f"{sizes[key]:,}" for key, words in names.items() if key in sizes}


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _loading(config: TrainConfig, folder: Path, result: RunResult, repo: str | None) -> dict[str, str]:
    """A section for each thing that was written, with the paths of the repository, or of the run's folder."""
    sections = {}
    for path, place in files(folder, result).items():
        where, more = repo or path.name, f', subfolder="{place}"' if repo and place else ""
        if path.suffix:
            sections[f"Loading {path.name}"] = _file(path, repo)
        elif path.name == PACKED:
            sections[f"Loading {'this repository' if repo and not place else 'packed/'}"] = _OURS.format(
                where=where, more=more, kind=_CLASSES[config.task]
            )
        else:
            stock = card.stock_loading(config.export.linear_class, where, more)
            sections["Loading with stock transformers"] = stock
    return sections


_CLASSES = {"language": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification"}
_OURS = """\
```python
import qat
from transformers import AutoTokenizer, {kind}

model = {kind}.from_pretrained("{where}"{more})
tokenizer = AutoTokenizer.from_pretrained("{where}"{more})
```

It computes with integer kernels what was trained, to the bit."""


def _file(path: Path, repo: str | None) -> str:
    if path.suffix == FORMATS["gguf"].suffix:
        source = f"-hf {repo}" if repo else f"-m {path.name}"
        return f'```\nllama-cli {source} -p "Once upon a time"\n```'
    reader = next(record.reader for record in FORMATS.values() if record.suffix == path.suffix)
    return f"{path.name} is read by {reader}."
