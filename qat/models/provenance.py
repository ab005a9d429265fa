"""What a model card must say about where the weights come from: licence and earlier quantization."""

from __future__ import annotations

import math
import re
from importlib import metadata
from pathlib import Path

from qat.formats.gguf.container import GGUFFile, kind_name


def package_license(package: str) -> str | None:
    """The licence that an installed distribution declares, as SPDX expression or free text."""
    try:
        facts = metadata.metadata(package.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return None
    for key in ("License-Expression", "License"):
        if facts[key]:
            return str(facts[key]).splitlines()[0]
    licenses = [line.rpartition(" :: ")[2] for line in facts.get_all("Classifier") or [] if line.startswith("License ::")]
    return licenses[0] if licenses else None


def readme_license(source: str, revision: str | None = None) -> str | None:
    """`license:` in the YAML head of a README.md in the model's folder, or of a hub model's README.md."""
    file = Path(source, "README.md") if Path(source).exists() else _hub_readme(source, revision)
    if file is None or not file.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*(\S+)", head.group(1), re.MULTILINE) if head else None
    return found.group(1).strip("\"'") if found else None


def _hub_readme(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, "README.md", revision=revision, etag_timeout=5))
    except Exception:  # a missing card or an unreachable hub only means that the licence stays unknown
        return None


def gguf_facts(file: GGUFFile) -> dict[str, str]:
    """`license` and `note` of a GGUF file, each where it has it.

    The note names the type that holds most weights, since a number measured on a dequantized model must say so.
    """
    declared = file.metadata.get("general.license")
    facts = {} if declared is None else {"license": str(declared)}
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        name = kind_name(tensor.kind)
        sizes[name] = sizes.get(name, 0) + math.prod(tensor.shape)
    kind = max(sizes, key=lambda name: sizes[name])
    bits = re.search(r"Q(\d)", kind)
    facts["note"] = f"{bits.group(1)}-bit GGUF ({kind}) dequantized" if bits else f"{kind} GGUF"
    return facts
