#!/usr/bin/env bash
# Policy gradient beside dTRPO in rounds on as many decoded answers, three seeds each, from the quickstart's SFT
# checkpoint: exact match on its 1000 held-out problems, a table and a plot. docs/online.md has our own.
#
#   bash examples/compare_online.sh [FOLDER [FLAG ...]]     # default: runs/quickstart; some 25 minutes more on 2 cores
#
# FOLDER is the quickstart's: what is missing there is made first. Flags are compare_online.py's (--seeds 1 2 3
# --iterations 40 --rounds 4 --processes 2). What is finished is not repeated: delete FOLDER/comparison to start again.
# PYTHON: a Python that has everything, instead of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-runs/quickstart}
shift $(($# > 0 ? 1 : 0))
[ -f "$out/done" ] || bash examples/quickstart.sh "$out"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1  # runs side by side have a thread each
exec "${PYTHON:-.venv/bin/python}" examples/compare_online.py --checkpoint "$out/sft" \
    --prompts "$out/data/problems.jsonl" --problems "$out/data/heldout.jsonl" --output "$out/comparison" \
    --gradient examples/quickstart_online.yaml --dtrpo examples/quickstart_dtrpo.yaml "$@"
