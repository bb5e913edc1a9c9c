#!/usr/bin/env bash
# Makes the CPU environment, .venv in this checkout, or leaves it alone when it is there and complete.
#
#   bash requirements/setup_cpu.sh          # from any directory; afterwards use CHECKOUT/.venv/bin/python
#
#   PYTHON=/path/to/python   the Python that .venv is made with (default: python3.11, else 3.12, 3.13 or python3).
#                            It decides on megatron-core: 0.16.1 with 3.11, 0.19.2 with 3.12 and 3.13
#   TORCH_SPEC="torch==..."  which torch to install, with pip's options if need be, instead of the CPU build;
#                            remembered: later calls need not repeat it
#
# May be sourced too: everything happens in a subshell, so that the caller's options and environment stay its own.

dtrpo_setup_cpu() (
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
    venv=$root/.venv
    python=$venv/bin/python
    constraints=$root/requirements/cpu-constraints.txt
    stamp=$venv/.dtrpo-stamp
    log=$venv/setup.log
    # Otherwise the next tests/run.sh would put the CPU build back.
    chosen=$venv/.dtrpo-torch-spec
    TORCH_SPEC=${TORCH_SPEC:-$(cat "$chosen" 2>/dev/null || true)}

    # An activated environment, or settings that send pip elsewhere, must neither be changed nor looked into.
    unset VIRTUAL_ENV PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_REQUIREMENT
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

    fail() {
        echo "error: $1" >&2
        exit 1
    }
    runs() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

    find_python() {
        if [ -n "${PYTHON:-}" ]; then
            runs "$PYTHON" || fail "PYTHON=$PYTHON does not run, or is older than Python 3.11"
            echo "$PYTHON"
            return
        fi
        for candidate in python3.11 python3.12 python3.13 python3; do
            if runs "$candidate"; then
                echo "$candidate"
                return
            fi
        done
        # The package itself works with 3.10; the versions in cpu-constraints.txt do not.
        fail "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python"
    }

    # What the environment was made from. The path counts: an editable install points to it.
    fingerprint() {
        { echo "$root $TORCH_SPEC"; cat "$root/setup.py" "$root/pyproject.toml" "$constraints"; } |
            { sha256sum 2>/dev/null || shasum -a 256; }
    }
    complete() { [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && runs "$python"; }

    make_venv() {
        if [ -x "$python" ] && "$python" -c '' 2>/dev/null; then
            runs "$python" || fail "$venv has a Python older than 3.11; remove it and try again"
        else
            base=$(find_python) || exit 1
            # What is left of an interrupted start, or of a Python that is gone.
            find "$venv" -mindepth 1 -maxdepth 1 ! -name .setup.lock -exec rm -rf {} +
            "$base" -m venv "$venv" >"$log" 2>&1 || give_up "$base -m venv $venv"
        fi
        "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >"$log" 2>&1 || give_up "ensurepip"
    }
    give_up() {
        tail -n 20 "$log" >&2
        fail "$1 failed; the lines above are the end of $log"
    }
    pip_install() { "$python" -m pip install "$@" >>"$log" 2>&1; }

    install_torch() {
        # setuptools: builds our own package below, without a network visit for a second copy.
        if [ -n "$TORCH_SPEC" ]; then
            read -ra spec <<<"$TORCH_SPEC"
            say "downloading $TORCH_SPEC, and what it needs"
            pip_install "setuptools>=77.0.3" "${spec[@]}" || give_up "installing TORCH_SPEC=$TORCH_SPEC"
            return
        fi
        say "downloading the CPU build of torch 2.13.0 (0.2 GB)"
        pip_install -c "$constraints" "setuptools>=77.0.3" "torch==2.13.0+cpu" && return
        pip_install -c "$constraints" "setuptools>=77.0.3" "torch==2.13.0+cpu" \
            --extra-index-url https://download.pytorch.org/whl/cpu && return
        # Last, because on Linux CUDA's packages come with it. Elsewhere it is the CPU build.
        say "no CPU build of torch to be had here: downloading the default one (on Linux 2.5 GB, 6 GB on disk)"
        pip_install -c "$constraints" "setuptools>=77.0.3" "torch==2.13.0" || give_up "installing torch"
    }
    install_triton() {
        # From 0.18 on megatron.core imports it, a package that CUDA builds of torch bring and a CPU build does not.
        # --no-deps: it asks for nothing that the import needs.
        "$python" -c 'import sys; from importlib.util import find_spec
sys.exit(sys.version_info < (3, 12) or sys.platform != "linux" or find_spec("triton") is not None)' || return 0
        say "downloading triton, which megatron-core imports (0.2 GB)"
        pip_install -c "$constraints" --no-deps triton || give_up "installing triton"
    }

    wanted=$(fingerprint) || exit 1
    complete && exit 0

    # Two scripts that set up at once would write over each other: the second waits, then finds all done.
    mkdir -p "$venv" || fail "cannot create $venv"
    if command -v flock >/dev/null; then
        exec 9>"$venv/.setup.lock" || fail "cannot write in $venv"
        flock -n 9 || { echo "waiting for another set-up of $venv ..." >&2; flock 9; }
        complete && exit 0
    fi

    say() { echo "$1 ..." >&2; }
    rm -f "$stamp"
    say "setting up $venv (a few minutes, once)"
    make_venv
    : >"$log"
    install_torch
    install_triton
    pins=$constraints
    if [ -n "$TORCH_SPEC" ]; then
        # A torch that the caller chose is not held to our pin, and neither is the triton that it brings.
        pins=$venv/constraints.txt
        grep -v -e '^torch==' -e '^triton==' "$constraints" >"$pins"
    fi
    cd "$root" || exit 1
    pip_install -c "$pins" --no-build-isolation -e ".[dev,examples]" || give_up "installing this package"
    echo "$TORCH_SPEC" >"$chosen"
    echo "$wanted" >"$stamp"
    echo "done: $python, $("$python" -c 'import platform; from importlib.metadata import version
print("Python", platform.python_version() + "".join(f", {name} {version(name)}" for name in ("torch", "megatron-core")))')" >&2
)

dtrpo_setup_cpu
