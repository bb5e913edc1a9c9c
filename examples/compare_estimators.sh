#!/usr/bin/env bash
# What each estimator buys: dTRPO, VRPO, ELBO and mean-field from one SFT checkpoint, on the same pairs, several seeds.
#
#   bash examples/quickstart.sh                        # makes the checkpoint and the pairs, in runs/quickstart
#   bash examples/compare_estimators.sh                # reads them; table and plot in runs/comparison
#
#   bash examples/compare_estimators.sh --checkpoint SFT --pairs pairs.jsonl --heldout-pairs more.jsonl \
#       --problems heldout.jsonl --output DIR --config my.yaml --seeds 1 2 3 [any setting of the trainer]
#
# A run that is finished is not repeated. Several processes per run: --processes N.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash requirements/setup_cpu.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1

if [ $# -eq 0 ]; then
    quickstart=runs/quickstart
    if [ ! -f "$quickstart/done" ]; then
        echo "error: $quickstart is not there or not finished: run bash examples/quickstart.sh first" >&2
        exit 2
    fi
    if [ ! -f "$quickstart/pairs_heldout.jsonl" ]; then
        .venv/bin/python tools/build_preferences.py --checkpoint "$quickstart/sft" --max-new-tokens 24 --samples 8 \
            --prompts "$quickstart/data/heldout.jsonl" --output "$quickstart/pairs_heldout.jsonl"
    fi
    set -- --checkpoint "$quickstart/sft" --pairs "$quickstart/pairs.jsonl" --output runs/comparison \
        --heldout-pairs "$quickstart/pairs_heldout.jsonl" --problems "$quickstart/data/heldout.jsonl" \
        --config examples/quickstart_dtrpo.yaml --processes 2
fi
exec .venv/bin/python examples/compare_estimators.py "$@"
