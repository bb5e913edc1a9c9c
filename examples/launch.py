"""The Python half of launch.sh: torchrun, which ends well on a SIGTERM that comes before it has workers.

torchrun listens to SIGTERM from when it starts its workers on. Until then, while it imports torch and meets the other
nodes, the signal would end it without a word. A thread receives the signal; the main thread blocks it, and so do the
workers that the main thread starts: one that only just runs hears of it later (megatron_dtrpo/runtime/stop.py).
"""

import os
import signal
import sys
import threading


def stop(signum, frame):
    print("stopped by SIGTERM before the first step; start the same command again", flush=True)
    os._exit(0)


def receive():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    threading.Event().wait()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=receive, daemon=True).start()
    del sys.path[0]
    from torch.distributed.run import main

    sys.exit(main())
