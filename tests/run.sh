#!/usr/bin/env bash
# Sets the CPU environment up if need be and runs the tests: all of them, or what pytest's own arguments choose.
#
#   bash tests/run.sh
#   bash tests/run.sh tests/unit -k layout
#   bash tests/run.sh -n 0 ...               # in one process; by default two share the files of tests
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash requirements/setup_cpu.sh

# Only tests need these here, and they are large; without them the tests that use them are skipped.
while read -r module package; do
    if ! compgen -G ".venv/lib/python*/site-packages/$module" >/dev/null; then
        echo "installing $package for its tests ..." >&2
        .venv/bin/python -m pip install --disable-pip-version-check --quiet -c requirements/cpu-constraints.txt "$package" ||
            echo "warning: $package could not be installed: its tests are skipped" >&2
    fi
done <<'PACKAGES'
datasets datasets
lm_eval lm-eval>=0.4.13,<0.5
trl trl>=1.16,<2
langdetect lm-eval[math,ifeval]>=0.4.13,<0.5
playwright playwright
fastapi fastapi
uvicorn uvicorn
httptools httptools
uvloop uvloop
openai openai
tenacity lm-eval[api]>=0.4.13,<0.5
PACKAGES

# Tests start several processes; each with a thread per core they would only get in each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# No test may depend on what the Hugging Face hub answers today.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

exec .venv/bin/python -m pytest --durations=10 -n 2 --dist loadfile --no-loadscope-reorder "$@"
