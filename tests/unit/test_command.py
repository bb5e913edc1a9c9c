"""One command: its table of verbs, their help and examples, its mistakes, and what it does not import."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module

import pytest

from megatron_dtrpo.cli import main as command
from megatron_dtrpo.cli import reference_page
from megatron_dtrpo.cli.main import VERBS
from tests.conftest import REPOSITORY
from tests.support.launch import _environment


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Verb -> its parser; those below convert by both words."""
    found = {}
    for verb, (module, _) in VERBS.items():
        found[verb] = parser = import_module(module).build_parser()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {f"{verb} {name}": below for name, below in action.choices.items()}
    return found


PARSERS = parsers()


@pytest.mark.parametrize("name", PARSERS)
def test_help_says_what_a_verb_does_and_ends_with_examples(name):
    parser = PARSERS[name]
    text = parser.format_help()
    assert re.match(r"[A-Z]\w+s\b.+\.$", text.splitlines()[0]), "what it does, in a sentence, first"
    assert f"usage: megatron-dtrpo {name} " in text
    _, _, examples = text.rpartition("examples:\n")
    lines = [line.strip() for line in examples.splitlines()]
    assert f"megatron-dtrpo {name}" in examples and lines
    for line in lines:
        words = shlex.split(line, comments=True)
        verb = words[words.index("megatron_dtrpo" if words[0] == "torchrun" else "megatron-dtrpo") + 1 :]
        shown = " ".join(verb[:2]) if " ".join(verb[:2]) in PARSERS else verb[0]
        options = {option for action in PARSERS[shown]._actions for option in action.option_strings}
        flags = {word for word in verb if word.startswith("--")}
        assert flags <= options, line
        required = {a.option_strings[0] for a in PARSERS[shown]._actions if a.required and a.option_strings}
        assert required <= flags, line


def test_the_table_is_printed(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert command.main(words) == 0
        printed = capsys.readouterr().out
        assert all(f"  {verb} " in printed and summary in printed for verb, (_, summary) in VERBS.items())
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("megatron-dtrpo ")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["convert", "import", "--help"]])
def test_who_reads_the_help_may_stop_early(words):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_dtrpo", *words],
        cwd=REPOSITORY,
        env=_environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.stderr == ""


MISTAKES = {
    "unknown verb": (["trian", "--lr", "1"], "unknown verb trian: the nearest known one is train"),
    "a former tool's name": (
        ["score_preferences"],
        "unknown verb score_preferences: the nearest known one is score",
    ),
    "misspelled required flag": (
        ["generate", "--chekpoint", "x"],
        "unknown flag --chekpoint: the nearest known one is --checkpoint",
    ),
    "below convert": (
        ["convert", "import", "--hf-pth", "x"],
        "unknown flag --hf-pth: the nearest known one is --hf-path",
    ),
    "flag of another verb": (["convert", "inspect", "x", "--gpus", "8"], "unknown flag --gpus: the nearest known"),
    "stray": (["plan", "--gpus", "8", "more"], "stray argument 'more'"),
    "no verb below": (["convert"], "required: {import,export,roundtrip,inspect}"),
    "a setting's choice": (["score", "--estimator", "none"], "argument --estimator: invalid choice: 'none'"),
    "nothing to score": (["score", "--checkpoint", "x"], "--data FILE is missing: which pairs are to be scored?"),
    "a number": (["doctor", "--nproc", "0"], "argument --nproc: must be at least 1"),
    "abbreviated": (["reference", "--outp", "x"], "unknown flag --outp: the nearest known one is --output"),
    "none of what is needed": (["pairs"], "required: --checkpoint, --prompts, --output"),
    "of the harness": (["evaluate", "--task", "gsm8k"], "unknown flag --task: the nearest known one is --tasks"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, capsys):
    words, message = MISTAKES[name]
    assert command.main(words) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and message in line and not captured.out


# Starts a command line in a fresh process and prints which heavy modules it has imported.
IMPORTED = """
import json, sys
from megatron_dtrpo.cli.main import main
try:
    status = main({words})
except SystemExit as end:
    status = end.code
assert not status, status
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}} & {{{heavy}}})))
"""
HEAVY = ("torch", "numpy", "megatron", "transformers", "yaml", "pyarrow", "argparse")
PLAN = ["plan", "--config", "examples/dtrpo_7b.yaml", "--gpus", "64"]


@pytest.mark.parametrize(
    "words, allowed",
    [
        (["--help"], set()),
        (PLAN, {"yaml", "argparse"}),
        (["train", "--help"], {"yaml", "argparse"}),
        (["score", "--help"], {"yaml", "argparse"}),
        (["reference", "--help"], {"yaml", "argparse"}),
        (["generate", "--help"], {"yaml", "argparse"}),
        (["pairs", "--help"], {"yaml", "argparse"}),
        (["evaluate", "--help"], {"yaml", "argparse"}),
        (["convert", "import", "--help"], {"yaml", "argparse"}),
    ],
    ids=lambda words: " ".join(words[:2]) if isinstance(words, list) else "",
)
def test_nothing_heavy_is_imported_before_it_is_needed(words, allowed):
    script = IMPORTED.format(words=words, heavy=", ".join(map(repr, HEAVY)))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) <= allowed


def test_every_module_of_the_room_is_a_verb_or_serves_them():
    modules = {path.stem for path in (REPOSITORY / "megatron_dtrpo" / "cli").glob("*.py")}
    assert modules == set(VERBS) | {"__init__", "main", "process", "settings", "decoding_flags", "reference_page"}


def test_the_page_of_commands_is_in_step():
    written = (REPOSITORY / "docs" / "commands.md").read_text(encoding="utf-8")
    assert written == reference_page.page(), "python -m megatron_dtrpo.cli.reference_page > docs/commands.md"
