#!/usr/bin/env bash
# benchmarks/classification.sh MODEL TRAIN DEV [SEEDS]: the recipe and plain QAT at two rates, each a run of qat.train under
# runs/classification; one that is done is left as it is. MODEL is a folder of MiniLM, TRAIN and DEV are .tsv files
# of SST-2 (sentence, label).
set -euo pipefail
model=$1 train=$2 dev=$3 seeds=${4:-0}
run() {
    local folder=runs/classification/$1
    shift
    if [ -f "$folder/config.yaml" ]; then
        python -m qat.train "resume=$folder"
    else
        python -m qat.train recipe=sst2_minilm "model.path=$model" "data.train=$train" "data.valid=$dev" trainer.threads=1 "run.dir=$folder" "$@"
    fi
}
plain="distill.ce=1 distill.kl=0 distill.hidden=0 optim.anneal=none"
for seed in $seeds; do
    run "recipe-$seed" "seed=$seed"
    for lr in 5e-4 1e-3; do # shellcheck disable=SC2086 # words of their own
        run "plain-$lr-$seed" "seed=$seed" "optim.lr=$lr" $plain
    done
done
