#!/usr/bin/env bash
# The whole circle on a laptop: data, SFT from nothing, pairs from the model's own right and wrong answers, dTRPO with
# tensor parallelism, exact match on held-out problems before and after, a Hugging Face folder at the end.
#
#   bash examples/quickstart.sh [FOLDER [SEED]]     # default: runs/quickstart 1; 5 to 10 minutes on 2 cores, no GPU
#
# A step that is finished is not repeated: delete FOLDER to start again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-runs/quickstart}
seed=${2:-1}
bash requirements/setup_cpu.sh
bin=.venv/bin
mkdir -p "$out"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

step() { printf '\n== %s\n' "$1"; }
# One thread per process: two processes keep two cores busy.
both() { "$bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 "$@"; }
answer() {
    both -m megatron_dtrpo generate --checkpoint "$1" --prompts "$out/data/heldout.jsonl" --output "$2" --verifier numeric \
        --max-new-tokens 24 --batch-size 128 --no-progress "${@:3}" 2>&1 | tee "${2%.jsonl}.txt"
}

step "1/6 data: sums with answers that a program can check, and a tokenizer for them"
"$bin/python" examples/arithmetic.py --output "$out/data" --train 58000 --problems 4000 --heldout 1000
"$bin/python" examples/train_tokenizer.py --input "$out/data/sft.jsonl" --output "$out/tokenizer" --vocab-size 258

step "2/6 SFT: a block-diffusion model from random weights, two data-parallel processes"
both -m megatron_dtrpo train --config examples/quickstart_sft.yaml --data-path "$out/data/sft.jsonl" --seed "$seed" \
    --tokenizer-model "$out/tokenizer" --save "$out/sft"

step "3/6 pairs: the model answers new problems, a verifier tells right from wrong"
[ -f "$out/pairs.jsonl" ] || both -m megatron_dtrpo pairs --checkpoint "$out/sft" --output "$out/pairs.jsonl" \
    --prompts "$out/data/problems.jsonl" --samples 4 --max-new-tokens 24 --batch-size 128 --seed "$seed" --no-progress

step "4/6 dTRPO: right against wrong answers, tensor parallelism 2"
both -m megatron_dtrpo train --config examples/quickstart_dtrpo.yaml --load "$out/sft" --seed "$seed" \
    --data-path "$out/pairs.jsonl" --save "$out/dtrpo" --tensor-model-parallel-size 2

step "5/6 1000 held-out problems, before dTRPO"
answer "$out/sft" "$out/before.jsonl"
step "5/6 the same problems, after dTRPO; $out/trace.html replays how the first ones were written"
answer "$out/dtrpo" "$out/after.jsonl" --trace "$out/trace.html"

step "6/6 export to Hugging Face, and curves"
[ -d "$out/huggingface" ] || "$bin/python" -m megatron_dtrpo convert export --megatron-path "$out/dtrpo" \
    --hf-path "$out/huggingface"
"$bin/python" examples/plot_run.py --runs "$out/sft" "$out/dtrpo" --output "$out/curves.png"
touch "$out/done"
printf '\nbefore: %s\nafter:  %s\n' "$(grep 'exact match' "$out/before.txt")" "$(grep 'exact match' "$out/after.txt")"
printf 'Checkpoints: %s/sft and %s/dtrpo; Hugging Face: %s/huggingface; curves: %s/curves.png\n' "$out" "$out" "$out" "$out"
