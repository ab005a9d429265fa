"""`python -m qat.bench`: the CPU kernels against what torch itself offers, in one run, with the machine's limits.

Every row is a median. Hot: the same weight again and again. Cold: weights rotated over at least 192 MB, so that each
call reads its weight from memory. The limits (read rate of memory, peak rate of the dot product instruction) take
their turns among the rows, because a neighbour may halve them from one second to the next; `share` is a row's part of
the tighter one. GOP/s counts 2 M N K operations a call, quantization of the activations, rescaling and the call itself
included.

    python -m qat.bench --shapes 2560x2560 --tokens 1 8 --threads 1 --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.config.flags import add_verbose

if TYPE_CHECKING:
    from qat.bench.layers import Row

SHAPES = ["2560x2560", "6912x2560", "2560x6912", "4096x4096", "11008x4096"]
PEERS = ["qat 2bit", "qat base3", "torch dynamic int8", "nn.Linear fp32", "nn.Linear bf16", "torch int4pack"]
PEERS += ["torch _int_mm, raw", "llama.cpp TQ2_0"]
"""Those of `qat.bench.layers`, by name: torch is imported when something is measured, not for --help."""


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "") or platform.processor()


def environment() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    import torch

    from qat import __version__
    from qat.ops import cpu

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "isa": cpu.isa(),
        "torch": torch.__version__,
        "qat": __version__,
        "python": platform.python_version(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
    }


def print_rows(rows: list[Row]) -> None:
    """One line a row; ratios are speed against dynamic int8 for `hot` and `cold`, time against nn.Linear for `train`."""
    for row in rows:
        share = f"{row.share:5.0%} of limit" if row.share is not None else " " * 14
        ratio = f"{row.ratio:6.2f}x" if row.ratio is not None else ""
        print(
            f"{row.regime:20}{row.shape:12}{row.tokens:5} tok {row.threads} thr  {row.what:28}{row.microseconds:11.1f} us"
            f"{row.gops:8.0f} GOP/s {share} {ratio}",
            flush=True,
        )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Measure what the arguments select."""
    import torch

    from qat.bench.layers import COLD_TOKENS, limit_memory, measure_linear, measure_training

    rows: list[Row] = []
    memory = limit_memory()
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape in arguments.shapes:
            n, k = (int(part) for part in shape.split("x"))
            for m in arguments.tokens if "linear" in arguments.regimes else []:
                for cold in [True, False] if m <= COLD_TOKENS else [False]:
                    limits, found = measure_linear(n, k, m, cold, threads, arguments.seconds, arguments.peers, memory)
                    print(f"limits here: memory {limits.read_gbs:.1f} GB/s, int8 dot products {limits.dot_gops:.0f} GOP/s")
                    print_rows(found)
                    rows += found
            if "train" in arguments.regimes:
                found = measure_training(n, k, arguments.train_tokens, threads, arguments.rounds, arguments.compile)
                print_rows(found)
                rows += found
    return rows


def main() -> None:
    """Time the CPU kernels beside torch's own layers."""
    parser = argparse.ArgumentParser(prog="python -m qat.bench", description=main.__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK", help="out_features x in_features")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 512], help="up to 32 tokens are measured cold too")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="torch threads")
    parser.add_argument("--regimes", nargs="+", default=["linear", "train"], choices=["linear", "train"])
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS, metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--train-tokens", type=int, default=2048, help="tokens of a training step")
    parser.add_argument("--rounds", type=int, default=5, help="training steps a layer")
    parser.add_argument("--seconds", type=float, default=0.3, help="least time a row")
    parser.add_argument("--compile", action="store_true", help="also measure fake quantization under torch.compile")
    parser.add_argument("--json", type=Path, help="write the rows here")
    add_verbose(parser)
    arguments = parser.parse_args()
    from qat.ops import cpu

    if not cpu.compiled():
        raise SystemExit(f"qat.bench needs the compiled kernels: {cpu.status().why}")
    about = environment()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
