import signal
import sys

# Of all that `python -m megatron_dtrpo.train` runs this comes first: signals that ask it to stop wait from here on
# (runtime/stop.py). A program that imports the package, or runs another of its modules, is left alone.
if sys.argv[:1] == ["-m"] and "megatron_dtrpo.train" in sys.orig_argv:
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
