#!/usr/bin/env bash
# What each estimator buys, without and with a likelihood anchor, on answers of three blocks whose steps depend on each
# other (running_totals.py): data, SFT from nothing, pairs of the model's own right and wrong answers, 16 preference runs
# for each of three seeds, a table and two plots in FOLDER/rows. docs/comparison.md has our own.
#
#   bash examples/compare_estimators.sh [FOLDER [FLAG ...]]     # default: runs/comparison; about an hour on 2 cores
#
# Flags are compare_estimators.py's (--seeds 1 2 3 4 --estimators dtrpo vrpo --anchors 0 1 --processes 4) and the trainer's
# (--lr 5e-5). What is finished is not repeated: delete FOLDER to start again. Sizes of the data and steps of SFT, for trying
# out: TRAIN, PROBLEMS, HELDOUT, HELDOUT_PAIRS, SFT_ITERS, SAMPLES. PYTHON: a Python that has everything, instead of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${PYTHON:-}" ] || bash requirements/setup_cpu.sh
python=${PYTHON:-.venv/bin/python}
out=${1:-runs/comparison}
shift $(($# > 0 ? 1 : 0))
mkdir -p "$out"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1  # runs side by side have a thread each

step() { printf '\n== %s\n' "$1"; }
pairs() {
    [ -f "$2" ] || "$python" -m megatron_dtrpo pairs --checkpoint "$out/sft" --prompts "$1" --output "$2" --seed 1 \
        --samples "${SAMPLES:-8}" --max-new-tokens 64 --batch-size 256 --no-progress
}

step "1/4 data: running totals, and a tokenizer of single characters"
[ -f "$out/data/sft.jsonl" ] || "$python" examples/running_totals.py --output "$out/data" --train "${TRAIN:-64000}" \
    --problems "${PROBLEMS:-1200}" --heldout "${HELDOUT:-400}" --heldout-pairs "${HELDOUT_PAIRS:-200}"
[ -f "$out/tokenizer/tokenizer.json" ] || "$python" examples/train_tokenizer.py --input "$out/data/sft.jsonl" \
    --output "$out/tokenizer" --vocab-size 258

step "2/4 SFT: the start and the reference of every row"
"$python" -m megatron_dtrpo train --config examples/comparison_sft.yaml --data-path "$out/data/sft.jsonl" --seed 1 \
    --tokenizer-model "$out/tokenizer" --save "$out/sft" --train-iters "${SFT_ITERS:-700}"

step "3/4 pairs: the model answers new problems, a verifier tells right from wrong"
pairs "$out/data/problems.jsonl" "$out/pairs.jsonl"
pairs "$out/data/problems_heldout.jsonl" "$out/pairs_heldout.jsonl"

step "4/4 every row, every seed"
exec "$python" examples/compare_estimators.py --checkpoint "$out/sft" --pairs "$out/pairs.jsonl" \
    --heldout-pairs "$out/pairs_heldout.jsonl" --problems "$out/data/heldout.jsonl" --output "$out/rows" \
    --config examples/comparison_dtrpo.yaml "$@"
