"""``megatron-dtrpo VERB ...``: imports the module of the verb, and no other, and calls its `main`.

Each module of the table has ``build_parser()``, and ``main(argv)``, which returns the exit status.
"""

from __future__ import annotations

import sys
from importlib import import_module

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.runtime import stop

VERBS = {
    "train": ("megatron_dtrpo.cli.train", "preference training and supervised fine-tuning"),
    "convert": ("megatron_dtrpo.cli.convert", "Hugging Face folders to checkpoints and back: import, export, ..."),
    "generate": ("megatron_dtrpo.cli.generate", "responses to prompts"),
    "pairs": ("megatron_dtrpo.cli.pairs", "preference pairs of a checkpoint's own right and wrong answers"),
    "score": ("megatron_dtrpo.cli.score", "rewards of preference pairs under a checkpoint"),
    "reference": ("megatron_dtrpo.cli.reference", "the reference policy's scores for a run, computed before it"),
    "evaluate": ("megatron_dtrpo.cli.evaluate", "benchmarks of the lm-evaluation-harness"),
    "serve": ("megatron_dtrpo.cli.serve", "a checkpoint over HTTP, as OpenAI's endpoints, and a page to watch it"),
    "plan": ("megatron_dtrpo.cli.plan", "layouts of a number of GPUs that a run fits on, best first"),
    "doctor": ("megatron_dtrpo.cli.doctor", "whether a run works on this machine, and what to fix"),
}
HELP = """megatron-dtrpo VERB ...: preference training of block-diffusion language models

{verbs}

  megatron-dtrpo VERB --help    what the verb does, its flags, an example
  megatron-dtrpo --version

Under torchrun: torchrun ... -m megatron_dtrpo VERB ..."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command line as all that this process does; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    verb, rest = (words[0], words[1:]) if words else ("--help", [])
    if verb not in VERBS:
        return run_command(_without_verb, [verb])
    if verb == "train":
        stop.block()  # to the end of the process, so that signals cannot spoil its exit either
    return import_module(VERBS[verb][0]).main(rest)


def _without_verb(words: list[str]) -> None:
    (word,) = words
    if word in ("-h", "--help"):
        print(help_text())
    elif word == "--version":
        print(version())
    else:
        from megatron_dtrpo.config.command_line import unknown

        raise unknown("verb", word, VERBS)


def help_text() -> str:
    return HELP.format(verbs="\n".join(f"  {verb:<10} {summary}" for verb, (_, summary) in VERBS.items()))


def version() -> str:
    from importlib import metadata

    try:
        return f"megatron-dtrpo {metadata.version('megatron-dtrpo')}"
    except metadata.PackageNotFoundError:
        return "megatron-dtrpo, not installed: it runs from its checkout"
