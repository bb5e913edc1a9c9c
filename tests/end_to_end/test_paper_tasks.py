"""`evaluate --tasks paper`: the harness's own tasks, prompts and scores, on stand-ins for their data. Answers are given
by heart: of each benchmark every second one is right."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_dtrpo.cli import evaluate, train
from megatron_dtrpo.diffusion.decoding import Completion
from megatron_dtrpo.evaluation.table import COLUMNS, NOTHING
from tests.support.launch import TINY_MODEL, flags, uneven_pairs, write_lines

lm_eval = pytest.importorskip("lm_eval", reason="the extra eval is not installed")
for needed in ("math_verify", "sympy", "langdetect", "immutabledict", "nltk"):
    pytest.importorskip(needed, reason='pip install "lm-eval[math,ifeval]"')
from megatron_dtrpo.evaluation.harness import HarnessModel  # noqa: E402

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]

POSITIONS = 2048
OTHERS = {f"Incorrect Answer {number}": f"wrong {number}" for number in (1, 2, 3)}
MATH = "algebra counting_and_prob geometry intermediate_algebra num_theory prealgebra precalc"
FINAL = "Final Answer: The final answer is $%s$. I hope it is correct."
CODE = "def plus_one(x):\n    '''%s: one more'''\n"
TESTS = [f"assert plus_one({n}) == {n + 1}" for n in range(3)]
# Task file below the harness's folder of tasks, its split, and rows with the answers to them. A prompt is recognised by
# the name that is in it, which %s stands for.
STANDINS = {
    "gsm8k/gsm8k.yaml": (
        "test",
        {"question": "%s: what is 3 and 4?", "answer": "3+4=7\n#### 7"},
        [" They are 7.\n#### 7", " They are 8.\n#### 8"],
    ),
    "gpqa/cot_zeroshot/gpqa_diamond_cot_zeroshot.yaml": (
        "train",
        {"Question": "%s: which one?", "Correct Answer": "the right one", **OTHERS},
        ["the right one", "wrong 2"],
    ),
    "humaneval/humaneval_plus.yaml": (
        "test",
        {
            "prompt": CODE,
            "test": "def check(f):\n    " + "\n    ".join(TESTS).replace("plus_one", "f"),
            "entry_point": "plus_one",
        },
        ["    return x + 1\n", "    return x + 2\n"],
    ),
    "mbpp/mbpp_plus.yaml": (
        "test",
        {"prompt": "%s: write plus_one.", "test_list": TESTS},
        ["def plus_one(x):\n    return x + 1\n", "no code"],
    ),
    "ifeval/ifeval.yaml": (
        "train",
        {
            "key": 1,
            "prompt": "%s: speak without a comma.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        },
        ["Not one.", "One, two."],
    ),
    **{
        f"minerva_math/minerva_math_{part}.yaml": (
            "test",
            {"problem": "%s: what is 1/2?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "1", "type": part},
            [FINAL % "\\frac{1}{2}", FINAL % "\\frac{1}{3}"],
        )
        for part in MATH.split()
    },
}


def write_standins(folder: Path, cache: str) -> dict[str, str]:
    """The harness's task files with local rows of data. Returns the answer to each prompt, by the name in it."""
    answers = {}
    tasks = Path(lm_eval.__file__).parent / "tasks"
    (folder / "tasks").mkdir(exist_ok=True)
    for number, (path, (split, row, written)) in enumerate(STANDINS.items()):
        names = [f"Nr{number:02}{sample}" for sample in range(len(written))]
        answers |= dict(zip(names, written, strict=True))
        splits = {"train": [f"shot {shot}" for shot in range(8)]} | {split: names}
        data = {
            each: str(write_lines(folder / f"{number}.{each}.jsonl", [_named(row, name) for name in named]))
            for each, named in splits.items()
        }
        files = {"data_files": data, "cache_dir": str(folder / cache)}
        own = {"task": Path(path).stem, "include": str(tasks / path), "dataset_path": "json", "dataset_name": None}
        (folder / "tasks" / Path(path).name).write_text(yaml.safe_dump({**own, "dataset_kwargs": files}))
    return answers


def _named(row: dict, name: str) -> dict:
    return {key: value.replace("%s", name) if isinstance(value, str) else value for key, value in row.items()}


class CodeEval:
    """For the metric that Hugging Face's hub has: the share of predictions that their tests pass with."""

    def compute(self, references, predictions, k):
        programs = [f"{one}\n{test}" for test, (one,) in zip(references, predictions, strict=True)]
        passed = [not subprocess.run([sys.executable, "-c", one], capture_output=True).returncode for one in programs]
        return {"pass@1": sum(passed) / len(passed)}, {}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    model = {**TINY_MODEL, "max_position_embeddings": POSITIONS}
    run = {"seq_length": 2048, "global_batch_size": 4, "train_iters": 1, "lr": 1e-9, "save": folder / "run"}
    assert train.main(flags({**model, **run, "data_path": uneven_pairs(folder / "pairs.jsonl", 4)})) == 0
    return folder / "run"


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    """Runs the tasks, with data that no earlier run has read, and returns the results and the table's row."""
    monkeypatch.setattr("evaluate.load", lambda name: CodeEval())
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")

    def tool(name: str) -> tuple[dict, dict[str, str]]:
        answers = write_standins(tmp_path, name)

        def by_heart(model, generations) -> list[Completion]:
            prompts = [model.text.decode(one.prompt) for one in generations]
            named = [max(answers, key=prompt.rfind) for prompt in prompts]
            written = [model.text.encode(answers[one]) for one in named]
            return [Completion(one, [0], [1.0], [0], len(one), True, []) for one in written]

        monkeypatch.setattr(HarnessModel, "_decode", by_heart)
        files = {"include_path": tmp_path / "tasks", "output": tmp_path / "out.json", "table": tmp_path / "table.md"}
        how = {"tasks": "paper", "max_new_tokens": 128, "confirm_run_unsafe_code": True, "log_samples": True}
        assert evaluate.main(flags({"checkpoint": checkpoint, **files, **how})) == 0
        row = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()[-1]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        return json.loads((tmp_path / "out.json").read_text()), dict(zip(COLUMNS, cells, strict=True))

    return tool


def test_every_column_that_the_harness_has_is_what_was_answered_right(run):
    results, row = run("first")
    by_hand = {"LiveCodeBench v6", "Arena-Hard v2", "MT-Bench"}
    assert {name for name, cell in row.items() if cell == NOTHING} == by_hand
    assert {name: cell for name, cell in row.items() if name not in by_hand} == {
        "model": row["model"],
        "tokens per pass": "1.00",
        **dict.fromkeys(("GPQA", "GSM8K", "MATH", "MBPP+", "HumanEval+", "IFEval"), "50.0"),
    }
    assert len(results["results"]) == len(STANDINS) + 1  # and the group of MATH's parts


def test_what_cannot_be_run_is_said_at_once(checkpoint, capsys):
    assert evaluate.main(flags({"checkpoint": checkpoint, "tasks": "paper"})) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --tasks paper runs code that the model wrote: add --confirm-run-unsafe-code")


def test_a_task_that_shuffles_does_it_alike_in_every_run(run):
    shuffled = []
    for name in ("once", "again"):
        random.seed(name)  # a process begins anywhere
        samples = run(name)[0]["samples"]["gpqa_diamond_cot_zeroshot"]
        shuffled.append([(one["doc"]["choices"], one["target"]) for one in samples])
    assert shuffled[0] == shuffled[1]
