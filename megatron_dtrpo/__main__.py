"""``python -m megatron_dtrpo VERB``, which ``torchrun -m megatron_dtrpo VERB`` starts in every process."""

import signal
import sys

# Before anything else is imported: signals that ask a run to stop wait from here on (runtime/stop.py).
if __name__ == "__main__" and sys.argv[1:2] == ["train"]:
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))

from megatron_dtrpo.cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
