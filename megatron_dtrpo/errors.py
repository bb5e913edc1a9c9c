"""How a program ends before its end, other than by a fault of ours."""


class UserError(Exception):
    """A mistake in what the user gave us: a file, a key, a flag, a checkpoint.

    The message is one line that names the file and line, or the key, and says what to do. Command-line entry
    points print it as ``error: ...`` and exit with status 2; a traceback would only hide it.
    """


class SharedError(UserError):
    """A `UserError` that every process of a run raises, because it was made of what all of them know of each other
    (`runtime.objects`). Rank zero prints it, and all leave their process groups together."""


class StopRequest(Exception):
    """Somebody asked the run to stop, by a signal, whose name is the text. Raised on every process, at the same place,
    or on one that hands it on by `runtime.objects.raise_together`. Entry points exit with status 0."""


def one_line(error: object, most: int = 300) -> str:
    """The message of ``error`` in one line of at most ``most`` characters; its class where it has no message."""
    return " ".join(str(error).split())[:most] or type(error).__name__
