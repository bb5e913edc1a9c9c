"""The one error type that is meant for the person who started the command."""


class UserError(Exception):
    """A mistake in what the user gave us: a file, a key, a flag, a checkpoint.

    The message is one line that names the file and line, or the key, and says what to do. Command-line entry
    points print it as ``error: ...`` and exit with status 2; a traceback would only hide it.
    """
