#!/usr/bin/env bash
# Every quantizer of the menu per channel for 0.41 million tokens, 800 updates of 1 x 512; goes on where it was ended, prints the table.
# Usage: benchmarks/menu.sh MODEL_FOLDER TRAIN.txt VALID.txt [OUT]   (80 to 100 seconds a row on one Zen 4 core)
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,3s/^# //p' "$0"; exit 2; }
for path in "$1" "$2" "$3"; do
  [ -e "$path" ] || { echo "skipped: $path is not there"; exit 0; }
done
out=${4:-runs/menu}
rows=(ternary twn ternary_count ternary_threshold lsq seq tequila sherry ternary_clipped binary seq2 uniform2 uniform3 uniform4
  ternary_sharpened-soft binary-soft)
for row in "${rows[@]}"; do
  folder="$out/$row" anneal=none
  grep -qs '"status": "done"' "$folder/result.json" && continue
  rm -rf "$folder"
  case "$row" in *-soft) anneal=soft ;; esac
  python -m qat.train recipe=stories260k "model.path=$1" "data.train=$2" "data.valid=$3" optim=adamw distill=none trainer.max_steps=800 \
    optim.lr=2e-3 optim.warmup_steps=20 'export.formats=[]' trainer.progress=false trainer.threads=1 \
    quant.granularity=channel "quant.weight=${row%-*}" "optim.anneal=$anneal" "run.dir=$folder"
done
python - "$out" "${rows[@]}" <<'PYTHON'
import json, sys
from pathlib import Path

print("| `quant.weight` | converted | trained | packed | bytes of the linear layers |\n|---|---:|---:|---:|---:|")
for row in sys.argv[2:]:
    found = json.loads((Path(sys.argv[1]) / row / "result.json").read_text())
    ppl, size = found["perplexity"], found["bytes"]["packed_linears"]
    print(f"| `{row}` | {ppl['converted']:.1f} | {ppl['trained']:.3f} | {ppl['packed']:.3f} | {size:,} |")
PYTHON
