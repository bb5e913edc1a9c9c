#!/usr/bin/env bash
# Before a release: every test on each Python given, with the default torch (on Linux its CUDA build: 2.5 GB to download
# and 6 GB on disk for each, under TMPDIR), from a fresh clone of the last commit. Prints a table for docs/status.md.
#
#   bash tests/release.sh python3.12 python3.13
#
#   KEEP=1   leaves the clones, with their logs and environments, where they are
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ $# -gt 0 ] || { echo "error: name the Pythons: bash tests/release.sh python3.12 python3.13" >&2; exit 2; }
scratch=$(mktemp -d)
[ -n "${KEEP:-}" ] || trap 'rm -rf "$scratch"' EXIT
table=$scratch/table.md
worst=0

row() { # checkout, exit status -> one line of the table
    "$1/.venv/bin/python" - "$1/results.xml" "$2" <<'PYTHON'
import platform
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version

import torch

suite = ElementTree.parse(sys.argv[1]).getroot().find("testsuite")
count = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
failed = count["failures"] + count["errors"]
cells = [platform.python_version(), version("megatron-core"), torch.__version__]
cells += [count["tests"] - failed - count["skipped"], failed, count["skipped"]]
cells += [f"{float(suite.get('time')) / 60:.0f} min", "passed" if sys.argv[2] == "0" else "failed"]
print("|", " | ".join(map(str, cells)), "|")
PYTHON
}

{
    echo "| Python | megatron-core | torch | passed | failed | skipped | time | |"
    echo "|---|---|---|---|---|---|---|---|"
} >"$table"
for python in "$@"; do
    checkout=$scratch/$(basename "$python")
    git clone --quiet "$root" "$checkout"
    echo "$python: everything it prints is in $checkout/log" >&2
    status=0
    PYTHON=$(command -v "$python") TORCH_SPEC="${TORCH_SPEC:-torch==2.13.0}" \
        bash "$checkout/tests/run.sh" --junitxml="$checkout/results.xml" >"$checkout/log" 2>&1 || status=$?
    tail -n 15 "$checkout/log" >&2
    if [ -f "$checkout/results.xml" ]; then
        row "$checkout" "$status" >>"$table"
    else
        echo "| $python | not set up | | | | | | failed |" >>"$table"
    fi
    [ "$status" = 0 ] || worst=1
done
cat "$table"
exit "$worst"
