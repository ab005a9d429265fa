"""One file that runs without transformers: the traced model with our ops inside, by torch.export or compiled by AOTInductor.

    kind "exported"  torch.export.save: the graph and its weights; any machine with torch and qat reads it
    kind "compiled"  torch._inductor.aoti_compile_and_package: machine code for this CPU (needs g++); no tracing at load

Both call `qat::packed_linear` by its schema (AOTInductor through its proxy executor, which takes strings and optional numbers),
so the process that runs one imports torch and `qat.ops`, which brings kernels or the pure-torch reference, whichever that machine
has. Packed bytes stay packed in the file. A model that `qat.inference` prepared calls `qat::cpu_linear` instead: compiled,
it runs where only torch and the library of kernels are loaded (torch.ops.load_library), but its tiles are this CPU's.

The graph takes token ids int64 [B, T] of any B and any T from 2 to what the model was made for, and gives logits float32
[B, T, V]; it has no key-value cache.
A file may also be a stack of PackedBitLinear layers without ids: give `example`.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.conversion.layers import packed_layers
from qat.formats.folder import new_file, one_line
from qat.formats.pt2.archive import check_archive
from qat.formats.pt2.seal import is_ours, mark, seal
from qat.inference.tiles import TiledLinear  # and with it qat.ops, which the graphs name
from qat.storage import local

KINDS = ("exported", "compiled")
Runner = Callable[[Tensor], Tensor]
_MARGIN = 2**20  # the graph, and what compiling writes


class _Logits(nn.Module):
    """A transformers model as a function of token ids alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        output: Any = self.model(input_ids=ids, use_cache=False)
        return output.logits


def trace(model: nn.Module, example: Tensor | None = None) -> torch.export.ExportedProgram:
    """The packed model as a graph whose batch and length are free.

    Args:
        model: a transformers causal language model with PackedBitLinear layers, or, with `example`, any module of one tensor.
        example: an input of at least 2 dimensions, each of the first two at least 2; default: token ids.

    Raises:
        ValueError: nothing is packed, or torch.export cannot trace the model; with its reason.
    """
    if not packed_layers(model) and not any(isinstance(module, TiledLinear) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no packed layers; call qat.pack first")
    module = model
    most = None
    if example is None:
        example, module = torch.zeros(2, 8, dtype=torch.int64), _Logits(model)
        most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=2, max=most)}
    try:
        with torch.no_grad():
            program = torch.export.export(module.eval(), (example,), dynamic_shapes=(sizes,), strict=False)
    except Exception as error:  # torch.export raises nearly any class
        raise ValueError(f"torch.export cannot trace {type(model).__name__}: {one_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # this machine's paths and source lines: more bytes than a small model's weights
    return program


def save(
    model: nn.Module,
    file: str | Path,
    *,
    kind: str = "exported",
    example: Tensor | None = None,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Write the packed model as one .pt2 file, which appears whole or not at all; see `trace` for the other arguments.

    Args:
        file: NAME.pt2; replaced if an earlier export wrote it.
        kind: of KINDS.
        check: called with the finished file before it gets its name; if it raises, nothing is left.

    Raises:
        ValueError: unknown kind, another suffix than .pt2, a foreign file in the way, a model that cannot be traced or compiled,
            a disk that refuses.
    """
    target = local(file)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not allowed; choose one of {', '.join(KINDS)}")
    if target.suffix != ".pt2":
        raise ValueError(f"{file} must end in .pt2")
    if target.exists() and not is_ours(target):
        raise ValueError(f"{target} exists and was not written by an export of qat; choose another target or remove it")
    program = trace(model, example)
    with new_file(target) as partial:
        _refuse_full_disk(program, partial)
        try:
            if kind == "exported":
                torch.export.save(program, partial)
            else:
                torch._inductor.aoti_compile_and_package(program, package_path=str(partial))
            mark(partial, target.stem)
        except Exception as error:  # OSError, or whatever the compiler raised
            raise ValueError(f"cannot write {target}: {one_line(error)}") from error
        if check is not None:
            check(partial)
    return target


def _refuse_full_disk(program: torch.export.ExportedProgram, file: Path) -> None:
    """torch's writer ends the process where a disk is full."""
    needed, free = sum(tensor.nbytes for tensor in program.state_dict.values()), shutil.disk_usage(file.parent).free
    if free < needed + _MARGIN:
        raise ValueError(f"cannot write {file.name}: it needs {needed + _MARGIN:,} bytes, and the disk has {free:,}")


def load(file: str | Path) -> Runner:
    """The function that a .pt2 file holds, of either kind. Needs torch and qat.ops only.

    An exported file holds no code, and is refused where it does (`qat.formats.pt2.archive`). A compiled file is machine code,
    which runs with your rights: load only your own.

    Raises:
        ValueError: the file is missing, damaged, altered, holds what no export writes, or was compiled for another machine.
    """
    if not Path(file).is_file():
        raise ValueError(f"{file} is missing")
    try:
        if kind_of(Path(file)) == "compiled":
            seal(Path(file)).refuse(file)
            runner: Any = torch._inductor.aoti_load_package(str(file))
            return runner
        check_archive(Path(file))
        seal(Path(file)).refuse(file)
        module: Any = torch.export.load(file).module()
        return module
    except Exception as error:  # zip, JSON, dynamic linker: nearly any class
        raise ValueError(f"{file} is no .pt2 file that this machine can run: {one_line(error)}") from error


def kind_of(file: Path) -> str:
    """Which of KINDS a .pt2 file is; zipfile.BadZipFile where it is none."""
    with zipfile.ZipFile(file) as archive:
        return "compiled" if any(name.endswith(".so") for name in archive.namelist()) else "exported"
