#!/usr/bin/env bash
# Tokens/s of a whole fine-tune in the Trainer, ternary against full precision (same data, batch, precision, optimizer; the
# `control` run of qat.train), cross-entropy first and a teacher beside it. Medians of REPEATS runs that take turns.
# Usage: benchmarks/finetune.sh STEPS REPEATS recipe=NAME key=value ...
# For example: benchmarks/finetune.sh 20 3 recipe=stories260k model.path=DIR data.train=FILE data.valid=FILE
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,5s/^# //p' "$0"; exit 2; }
steps=$1 repeats=$2; shift 2
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
common=("$@" "trainer.max_steps=$steps" 'export.formats=[]' trainer.progress=false optim.warmup_steps=1
        "trainer.val_every=$steps" "trainer.checkpoint_every=$steps" eval.max_tokens=2048)
one() { # NAME key=value ...
  local name=$1; shift
  python -m qat.train "${common[@]}" "$@" "run.dir=$out/$name" > "$out/log" 2>&1 || { tail -5 "$out/log"; exit 1; }
}
for repeat in $(seq "$repeats"); do
  for precision in 32-true bf16-mixed; do
    for backward in input bf16 int8; do
      one "$precision.$backward.ce.$repeat" distill=none "trainer.precision=$precision" "quant.backward=$backward" control.enabled=true
    done
    one "$precision.input.kl.$repeat" distill=kl "trainer.precision=$precision"
  done
done
python - "$out" "$@" <<'PYTHON'
import json, platform, statistics, sys
from collections import defaultdict
from pathlib import Path

import torch

print(f"{' '.join(sys.argv[2:])}\n{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
speed, control = defaultdict(list), defaultdict(list)
for file in sorted(Path(sys.argv[1]).glob("*/result.json")):
    precision, backward, loss, _ = file.parent.name.split(".")
    result = json.loads(file.read_text())
    speed[precision, backward, loss].append(result["tokens_per_second"])
    if result.get("control"):
        control[precision].append(result["control"]["tokens"] / result["control"]["seconds"])
for precision, rates in control.items():
    print(f"{precision:12} full precision          {statistics.median(rates):9.0f} tokens/s  1.00x")
for (precision, backward, loss), rates in speed.items():
    rate = statistics.median(rates)
    print(f"{precision:12} backward={backward:6} {loss:6}  {rate:9.0f} tokens/s  {rate / statistics.median(control[precision]):.2f}x")
PYTHON
