#!/usr/bin/env bash
# The whole loop on a laptop: data, tokenizer, SFT from nothing, dTRPO with tensor parallelism, held-out accuracy.
#
#   bash examples/quickstart.sh [FOLDER]     # default: runs/quickstart; about 7 minutes on 2 cores, no GPU
#
# A finished step is not repeated: delete FOLDER to start again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-runs/quickstart}
bash requirements/setup_cpu.sh
bin=.venv/bin
mkdir -p "$out"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

step() { printf '\n== %s\n' "$1"; }
# One thread per process: two processes keep two cores busy. torchrun restates every failure at length; ours is enough.
train() { "$bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_dtrpo.train "$@"; }
score() {
    "$bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 tools/score_preferences.py \
        --reference "$out/sft" --data "$out/data/pairs_heldout.jsonl" \
        --num-views 4 --steps-per-block 4 --micro-batch-size 16 --no-progress "$@"
}

step "1/5 data: arithmetic word problems with verifiable answers, and a tokenizer for them"
"$bin/python" examples/arithmetic.py --output "$out/data" --train 36000 --pairs 2000 --heldout 500
"$bin/python" examples/train_tokenizer.py --input "$out/data/sft.jsonl" "$out/data/pairs_train.jsonl" \
    --output "$out/tokenizer" --vocab-size 448

step "2/5 SFT: a block-diffusion model from random weights, two data-parallel processes"
train --config examples/quickstart_sft.yaml --data-path "$out/data/sft.jsonl" \
    --tokenizer-model "$out/tokenizer/tokenizer.model" --save "$out/sft"

step "3/5 dTRPO: right against wrong solutions, tensor parallelism 2"
train --config examples/quickstart_dtrpo.yaml --load "$out/sft" --data-path "$out/data/pairs_train.jsonl" \
    --save "$out/dtrpo" --tensor-model-parallel-size 2

step "4/5 500 held-out pairs before dTRPO (the policy is its own reference: every reward is a tie)"
score --checkpoint "$out/sft" | tee "$out/before.txt"
step "4/5 the same pairs after dTRPO"
score --checkpoint "$out/dtrpo" --output "$out/scores.jsonl" | tee "$out/after.txt"

step "5/5 curves"
"$bin/python" examples/plot_run.py --runs "$out/sft" "$out/dtrpo" --output "$out/curves.png"
printf '\nDone. Runs: %s/sft and %s/dtrpo (tensorboard --logdir %s); curves: %s/curves.png\n' "$out" "$out" "$out" "$out"
