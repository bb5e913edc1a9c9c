#!/usr/bin/env bash
# Runs the tests that build on megatron-core under another release of it, with the Python and torch of .venv.
#
#   bash tests/other_core.sh                               # 0.19.2, the tests listed below
#   bash tests/other_core.sh 0.18.0 tests/unit -k planning # another release, and pytest's own arguments
#
# Releases from 0.17 on ask for Python 3.12. Under 3.11 their Python source is unpacked all the same, and runs: what is
# compiled in them serves Megatron's own data sets only. That is a way for continuous integration where torch is to be
# had for 3.11; tests/release.sh runs everything on a Python that the release is for.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash requirements/setup_cpu.sh
release=${1:-0.19.2}
shift || true
if [ $# = 0 ]; then
    # Model, precision, planning; then resume, scoring, conversion, decoding and interleaving in several processes.
    set -- tests/unit/test_{versions,precision,planning,recomputation,optimizer_state,step,conversion,hybrid_model}.py \
        tests/distributed/test_{model,resume,releases,scoring,decoding,interleaving}.py \
        tests/distributed/test_{conversion_layouts,conversion_function,hybrid_model}.py
fi

if .venv/bin/python -c "from importlib.metadata import version; raise SystemExit(version('megatron-core') != '$release')"; then
    echo "megatron-core $release is what .venv has: bash tests/run.sh runs everything on it" >&2
    exit 0
fi

# An environment of its own in front of .venv, so that processes that tests start have it, too.
overlay=.venv/core-$release
if [ ! -f "$overlay/complete" ]; then
    echo "unpacking megatron-core $release and triton into $overlay (0.2 GB to download) ..." >&2
    rm -rf "$overlay"
    .venv/bin/python -m venv --without-pip "$overlay"
    packages=$("$overlay/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet)
    since=$(.venv/bin/python -c 'import sys; print("--python-version 3.12" if sys.version_info < (3, 12) else "")')
    # shellcheck disable=SC2086
    "${pip[@]}" download --no-deps --only-binary=:all: $since --dest "$overlay" "megatron-core==$release"
    .venv/bin/python -m zipfile -e "$overlay"/megatron_core-*.whl "$packages"
    .venv/bin/python -c 'import triton' 2>/dev/null ||
        "${pip[@]}" install --no-deps --target "$packages" -c requirements/cpu-constraints.txt triton
    .venv/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
        >"$packages/behind.pth"
    rm "$overlay"/*.whl
    touch "$overlay/complete"
fi
"$overlay/bin/python" -c "from importlib.metadata import version; assert version('megatron-core') == '$release'"

# Tests of two releases take this one and .venv's own.
MEGATRON_DTRPO_OTHER_CORE=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export MEGATRON_DTRPO_OTHER_CORE OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
exec "$overlay/bin/python" -m pytest --durations=10 -n 2 --dist loadfile -p no:cacheprovider "$@"
