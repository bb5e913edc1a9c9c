# The bash half of an example that is both bash and Python; sourced by it. Starts torchrun on the example, or for a dry
# run, which needs no processes, Python.
#
#   NNODES           nodes (default 1); start the same command on each
#   NPROC_PER_NODE   processes on this node (default: its GPUs, or 8)
#   RDZV_ENDPOINT    HOST:PORT of one of the nodes, the same on all; needed for more than one
#   RDZV_ID          a name for this run, the same on all (default: megatron-dtrpo)
#   PYTHON           default: the checkout's .venv, or python3
#
# However it is started, the trainer sets PYTORCH_CUDA_ALLOC_CONF, TORCHINDUCTOR_COMPILE_THREADS and TORCHINDUCTOR_CACHE_DIR
# (a cache of compiled kernels that all processes and restarts share) where they are not set here or before.
set -euo pipefail
# Until Python starts; launch.py goes on from there.
trap 'echo "stopped by SIGTERM before the first step; start the same command again"; exit 0' TERM
trap '' USR1
example=$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)/$(basename "${BASH_SOURCE[1]}")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3

gpus=$( { nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
nodes=${NNODES:-1}
processes=${NPROC_PER_NODE:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 8)}

for word in "$@"; do
    if [ "$word" = --dry-run ]; then
        exec "$python" "$example" --world-size $((nodes * processes)) "$@"
    fi
done

if [ "$nodes" != 1 ] && [ -z "${RDZV_ENDPOINT:-}" ]; then
    echo "error: NNODES is $nodes: set RDZV_ENDPOINT=HOST:PORT to one of the nodes, the same on all" >&2
    exit 2
fi
# SIGUSR1 means: save and stop. It reaches every process of a Slurm job; the trainer handles it, torchrun is to survive it,
# which is why it is ignored above.
# A SIGTERM between bash and Python waits, where `env` can have it wait (coreutils 8.31); elsewhere it ends Python's first 0.1 s.
hold="env --block-signal=TERM"
$hold true 2>/dev/null || hold=
exec $hold "$python" "$root/examples/launch.py" --nnodes "$nodes" --nproc-per-node "$processes" --rdzv-backend c10d \
    --rdzv-endpoint "${RDZV_ENDPOINT:-localhost:0}" --rdzv-id "${RDZV_ID:-megatron-dtrpo}" "$example" "$@"
