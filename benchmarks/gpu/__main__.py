"""`python -m benchmarks.gpu`: the tables of benchmarks/gpu.sh, printed and written as JSON after each section.

python -m benchmarks.gpu --parts operations step --json gpu.json
python -m benchmarks.gpu --sections decode prefill
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.rows import Bench
from benchmarks.gpu.sections import PARTS, STEPS, measured, sections
from benchmarks.gpu.timing import Ceilings
from qat import ops
from qat.ops.build import cuda as build_cuda

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("transformers", "triton", "torchao", "vllm", "sgl-kernel", "bitblas")


def _said(*command: str) -> str:
    """What a command prints first, or why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError as error:
        return str(error)
    return (done.stdout or done.stderr or "nothing").strip().splitlines()[0]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    about = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("QAT_COMMIT") or _said("git", "describe", "--always", "--dirty"),
        "cpu cores": os.cpu_count(),
        "peers": ", ".join(f"{name} {_version(name)}" for name in PEERS),
    }
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        driver = _said("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader")
        about |= {"gpu": facts.name, "multiprocessors": facts.multi_processor_count, "L2 bytes": facts.L2_cache_size}
        about |= {"driver, clocks, power limit": driver, "kernels": ops.backend()["cuda"]["why"]}
        about["nvcc"] = (build_cuda.compiler() or ("", "not found"))[1]
    return about | {key: value for key, value in os.environ.items() if key.startswith("QAT_")}


def main() -> None:
    """Measure the CUDA kernels beside their peers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=main.__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--models", nargs="+", default=list(STEPS), choices=list(STEPS), help="of the step")
    names = [section.name for section in sections(list(STEPS))]
    parser.add_argument("--sections", nargs="+", default=names, choices=names, help="of these parts, in their own order")
    parser.add_argument("--seconds", type=float, default=0.2, help="least time a row")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a GPU that torch can use")
    device = torch.device("cuda", torch.cuda.current_device())
    about = environment(device)
    print("\n".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    ceilings = Ceilings.measure(device, 1.0)
    print(f"ceilings: {ceilings.line()}", flush=True)
    bench = Bench(device, ceilings, arguments.seconds, about["L2 bytes"])
    asked = [one for one in sections(arguments.models) if one.part in arguments.parts and one.name in arguments.sections]
    rows: list[Any] = []
    for found in measured(bench, asked):
        rows += [asdict(row) for row in found]
        if arguments.json:
            result = {"environment": about, "ceilings": asdict(ceilings), "rows": rows}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
