#!/usr/bin/env bash
# The earlier stories260k recipe over three seeds and three settings, 1.6 million tokens each; prints every perplexity.
# Usage: benchmarks/stories260k.sh MODEL_FOLDER TRAIN.txt VALID.txt [OUT]   (about 9 minutes a run on one Zen 4 core)
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,3s/^# //p' "$0"; exit 2; }
for path in "$1" "$2" "$3"; do
  [ -e "$path" ] || { echo "skipped: $path is not there"; exit 0; }
done
out=${4:-runs/stories260k-benchmark}
common=(recipe=stories260k "model.path=$1" "data.train=$2" "data.valid=$3" 'export.formats=[]' trainer.progress=false optim=adamw
  data.batch_size=8 optim.lr=2e-3 optim.latent_lr_multiplier=2 optim.warmup_steps=20 trainer.max_steps=390)
python -m qat.train -m "${common[@]}" distill=none seed=0,1,2 run.dir="$out/tensor-ce"
python -m qat.train -m "${common[@]}" seed=0,1,2 distill=kl run.dir="$out/tensor-kl"
python -m qat.train -m "${common[@]}" seed=0,1,2 distill=kl quant=ternary_channel run.dir="$out/channel-kl"
python - "$out" <<'PYTHON'
import json, statistics, sys
from pathlib import Path

for folder in sorted(Path(sys.argv[1]).iterdir()):
    runs = [json.loads(file.read_text())["perplexity"] for file in sorted(folder.glob("*/result.json"))]
    trained = [run["trained"] for run in runs]
    print(f"{folder.name}: full precision {runs[0]['full_precision']:.3f}, converted {runs[0]['converted']:.0f},",
          f"trained {', '.join(f'{value:.3f}' for value in trained)}, median {statistics.median(trained):.3f}")
PYTHON
