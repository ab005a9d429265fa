#!/usr/bin/env bash
# Every quantizer of the menu per channel, and every option beside them on ternary codes, for 0.41 million tokens: 800 updates of 1 x 512.
# Goes on where it was ended, prints the table.
# Usage: benchmarks/menu.sh MODEL_FOLDER TRAIN.txt VALID.txt [OUT]   (80 to 100 seconds a row on one Zen 4 core)
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,4s/^# //p' "$0"; exit 2; }
for path in "$1" "$2" "$3"; do
  [ -e "$path" ] || { echo "skipped: $path is not there"; exit 0; }
done
out=${4:-runs/menu}
rows=(ternary twn ternary_count ternary_threshold lsq seq tequila sherry ternary_clipped binary seq2 uniform2 uniform3 uniform4
  ternary_sharpened-soft binary-soft)
options=(
  "act4 quant.act_bits=4"
  "act4-hadamard quant.act_bits=4 quant.act_hadamard=true"
  "norms quant.rms_norm_eps=1e-6"
  "norms-calibrated quant.rms_norm_eps=1e-6 quant.rms_norm_start=calibrated"
  "norms-blended quant.rms_norm_eps=1e-6 quant.rms_norm_start=blended optim.rms_norm_steps=160"
  "muon optim.latent_optimizer={_target_:torch.optim.Muon}"
  "decay-half optim.weight_decay=0.1 optim.weight_decay_until=0.5"
  "damping optim.damping=0.01"
  "freezing optim.freeze_oscillation=0.02"
  "lambda-linear optim.lambda_steps=160"
  "lambda-sigmoid optim.lambda_steps=160 optim.lambda_schedule=sigmoid"
  "lambda-layerwise optim.lambda_steps=160 optim.lambda_schedule=layerwise"
)
train() { # NAME key=value ...
  local folder="$out/$1"; shift
  grep -qs '"status": "done"' "$folder/result.json" && return
  rm -rf "$folder"
  python -m qat.train recipe=stories260k "${common[@]}" "$@" "run.dir=$folder"
}
common=("model.path=$1" "data.train=$2" "data.valid=$3" optim=adamw distill=none trainer.max_steps=800 optim.lr=2e-3
  optim.warmup_steps=20 'export.formats=[]' trainer.progress=false trainer.threads=1 quant.granularity=channel)
for row in "${rows[@]}"; do
  anneal=none layout=2bit
  case "$row" in *-soft) anneal=soft ;; sherry) layout=sparse ;; esac
  train "$row" "quant.weight=${row%-*}" "optim.anneal=$anneal" "export.layout=$layout"
done
for option in "${options[@]}"; do
  read -ra words <<< "$option"
  train "${words[@]}"
done
python - "$out" "${rows[@]}" -- "${options[@]}" <<'PYTHON'
import json, sys
from pathlib import Path

split = sys.argv.index("--")
for what, rows in (("`quant.weight`", sys.argv[2:split]), ("option", sys.argv[split + 1 :])):
    print(f"\n| {what} | converted | trained | packed | bytes of the linear layers |\n|---|---:|---:|---:|---:|")
    for row in rows:
        name, _, says = row.partition(" ")
        found = json.loads((Path(sys.argv[1]) / name / "result.json").read_text())
        ppl, size = found["perplexity"], found["bytes"]["packed_linears"]
        print(f"| `{says or name}` | {ppl['converted']:.1f} | {ppl['trained']:.3f} | {ppl['packed']:.3f} | {size:,} |")
PYTHON
