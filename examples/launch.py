"""The Python half of launch.sh: torchrun, which ends well on a SIGTERM that comes before it has workers.

torchrun listens to SIGTERM from when it starts its workers on. Until then, while it imports torch and meets the other
nodes, the signal would end it without a word. A thread receives the signal; the main thread blocks it, and so do the
workers that the main thread starts: one that only just runs hears of it later (megatron_dtrpo/runtime/stop.py).
"""

import _thread
import os
import signal
import sys
import threading


def receive():
    while True:
        signal.sigwait([signal.SIGTERM])
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            _thread.interrupt_main(signal.SIGTERM)  # torchrun listens, and stops in its own way
            continue
        # Here and not in a handler: that would wait for the main thread, which may be waiting for other nodes.
        print("stopped by SIGTERM before the first step; start the same command again", flush=True)
        os._exit(0)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=receive, daemon=True).start()
    del sys.path[0]
    from torch.distributed.run import main

    sys.exit(main())
