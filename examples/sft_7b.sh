#!/usr/bin/env bash
''':'
# Qwen2.5-7B-Instruct to a block-diffusion model, as Fast-dLLM v2 was made. Settings are in sft_7b.yaml; flags given here win over it.
#
#   torchrun --nnodes N --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT examples/sft_7b.sh [flags]
#   bash examples/sft_7b.sh [flags]      # starts torchrun itself; see launch.sh for NNODES and the like
#   bash examples/sft_7b.sh --dry-run    # what would run, and in how much memory; needs no GPU
#
# torchrun starts Python on this file, for which these lines are a string. Bash runs them and comes no further; what
# follows is a here-document to it.
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
: <<'pass'
'''

import signal
import sys

if __name__ == "__main__":  # from here on what asks the run to stop waits until it can
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))

from pathlib import Path

if __name__ == "__main__":  # the processes that write a checkpoint import this file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from megatron_dtrpo.cli.main import main

    sys.exit(main(["train", "--config", str(Path(__file__).with_suffix(".yaml")), *sys.argv[1:]]))
pass
