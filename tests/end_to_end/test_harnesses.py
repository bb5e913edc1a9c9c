"""The recipes of docs/evaluation.md as they stand there: benchmarks' own harnesses against `megatron-dtrpo serve`.

Questions, references and judges are stand-ins. The harnesses are theirs, and run in copies.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import string
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from megatron_dtrpo.cli import train
from tests.conftest import REPOSITORY
from tests.support.chat_tokenizer import save_chat_tokenizer
from tests.support.launch import TINY_MODEL, flags, read_rows, uneven_pairs, write_lines
from tests.support.server import Server, serving

pytest.importorskip("fastapi", reason="the extra serve is not installed")

CLONES = Path(os.environ.get("MEGATRON_DTRPO_HARNESSES", ""))
pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.slow,
    pytest.mark.skipif(
        CLONES == Path(),
        reason="MEGATRON_DTRPO_HARNESSES names no folder of clones: docs/evaluation.md, first block of each recipe",
    ),
]

NEW = 48  # tokens that the harnesses ask for here
PROGRAM = "```\nprint(input()[::-1])\n```"
LETTERS = string.printable + 5 * string.ascii_lowercase + 20 * " " + 10 * "`"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """Serves ``coder``, which learned to answer everything with one program, and ``qwen_talker``, of random weights."""
    folder = tmp_path_factory.mktemp("harnesses")
    tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": save_chat_tokenizer(folder / "words")}
    model = {**TINY_MODEL, **tokenizer, "max_position_embeddings": 4096}
    rng = random.Random(0)

    def turns() -> list[dict]:
        words = ["".join(rng.choices(LETTERS, k=rng.randint(60, most))) for most in (300, 900)]
        return [{"role": "system", "content": words[0]}, {"role": "user", "content": words[1]}]

    rows = [{"messages": [*turns(), {"role": "assistant", "content": PROGRAM}]} for _ in range(400)]
    learned = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "init_method_std": 0.1, "rotary_base": 1000}
    run = {"objective": "sft", "block_start": "clean", "data_path": write_lines(folder / "sft.jsonl", rows)}
    run |= {"seq_length": 4096, "global_batch_size": 8, "micro_batch_size": 8, "train_iters": 160, "lr": 4e-3}
    assert train.main(flags({**model, **learned, **run, "save": folder / "coder"})) == 0
    run = {"seq_length": 2048, "global_batch_size": 4, "train_iters": 1, "lr": 1e-9, "init_method_std": 0.5}
    run["data_path"] = uneven_pairs(folder / "pairs.jsonl", 4)
    assert train.main(flags({**model, **run, "save": folder / "qwen_talker"})) == 0
    models = {"checkpoint": folder / "coder", "compare": folder / "qwen_talker"}
    with serving(folder / "serve.log", **models) as server:
        yield server


@pytest.fixture
def judge() -> Iterator[Callable[..., str]]:
    """(rule, asked) -> address of a judge that answers to a question what ``rule`` says, and puts it into ``asked``."""
    servers = []

    def start(rule: Callable[[str], str], asked: list[str]) -> str:
        class Judge(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions" and self.headers["Authorization"] == "Bearer KEY"
                words = request["messages"][-1]["content"]
                asked.append(words)
                message = {"role": "assistant", "content": rule(words)}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                body = {"id": "1", "object": "chat.completion", "created": 1, "model": request["model"]}
                body = json.dumps(body | {"choices": [choice]}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Judge))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1"

    yield start
    for one in servers:
        one.shutdown()
        one.server_close()


def run_recipe(heading: str, clone: str, copy: Path, server: Server, model: str, **environment) -> str:
    """Runs the second block below ``heading`` of the page in ``copy``, with the environment of the ``clone``; returns
    what it printed."""
    page = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
    _, _, rest = page.partition(f"\n#### {heading}\n")
    commands = re.findall(r"^```bash\n(.*?)^```", rest, re.MULTILINE | re.DOTALL)[1]
    commands = re.sub(r"(max.tokens:? )\d+", rf"\g<1>{NEW}", commands)
    commands = re.sub(r"(--multiprocess) \d+", r"\1 2", commands)
    commands = commands.replace("RUN", model).replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI", "PYTHON"))}
    path = f"{CLONES.resolve() / clone / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    (copy / "recipe.sh").write_text("set -eo pipefail\n" + commands)
    with (copy / "recipe.log").open("wb") as log:
        ended = subprocess.run(
            ["timeout", "-k", "5", "300", "bash", "recipe.sh"],  # it ends all that the recipe started, too
            cwd=copy,
            env={**inherited, "PATH": path, "PYTHONPATH": str(copy), "HF_HOME": str(copy / "cache"), **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    printed = (copy / "recipe.log").read_text(errors="replace")
    assert ended.returncode == 0, printed
    return printed


def copy_of(clone: str, folder: Path, *without: str) -> Path:
    kept_out = shutil.ignore_patterns(".git", ".venv", "assets", "__pycache__", *without)
    return Path(shutil.copytree(CLONES / clone, folder / clone, ignore=kept_out))


def answer(server: Server, model: str, messages: list[dict]) -> str:
    asked = {"model": model, "messages": messages, "temperature": 0, "max_tokens": NEW}
    status, body = server.post("/v1/chat/completions", **asked)
    assert status == 200, body
    return body["choices"][0]["message"]["content"]


LOADER = """
import json
import datasets

class Config(datasets.BuilderConfig):
    def __init__(self, version_tag=None, **others):
        super().__init__(**others)
        assert version_tag == "release_v6"

class Problems(datasets.GeneratorBasedBuilder):
    BUILDER_CONFIG_CLASS = Config
    def _info(self):
        return datasets.DatasetInfo()
    def _split_generators(self, manager):
        return [datasets.SplitGenerator(name="test", gen_kwargs={"path": manager.download("test.jsonl")})]
    def _generate_examples(self, path):
        yield from enumerate(json.loads(line) for line in open(path))
"""


def problem(number: int, words: str, *tests: tuple[str, str]) -> dict:
    first, *others = [{"input": given, "output": wanted, "testtype": "stdin"} for given, wanted in tests]
    row = {"question_title": words, "question_content": words, "question_id": f"p{number}", "contest_id": "c"}
    row |= {"platform": "atcoder", "difficulty": "easy", "contest_date": "2025-03-01T00:00:00", "starter_code": ""}
    return row | {"public_test_cases": json.dumps([first]), "private_test_cases": json.dumps(others), "metadata": "{}"}


PROBLEMS = [
    problem(1, "Print the line from its end to its beginning.", ("abc", "cba\n"), ("x y", "y x")),
    problem(2, "Print the line twice.", ("aa", "aa"), ("abc", "abcabc")),
    problem(3, "Print the line backwards.", ("12", "21"), ("\n", "\n")),
]


def test_live_code_bench(server, tmp_path):
    """The problems come as the benchmark's do: with a script, from a folder of their name."""
    copy = copy_of("LiveCodeBench", tmp_path)
    data = copy / "livecodebench" / "code_generation_lite"
    data.mkdir(parents=True)
    (data / "code_generation_lite.py").write_text(LOADER)
    write_lines(data / "test.jsonl", PROBLEMS)
    printed = run_recipe("LiveCodeBench v6", "LiveCodeBench", copy, server, "coder")
    assert "Loaded 3 problems" in printed
    output = copy / "output" / "coder"
    metrics = json.loads((output / "Scenario.codegeneration_1_0.0_eval.json").read_text())
    assert metrics[0]["pass@1"] == pytest.approx(2 / 3)
    rows = json.loads((output / "Scenario.codegeneration_1_0.0_eval_all.json").read_text())
    assert [row["graded_list"] for row in rows] == [[True], [False], [True]]
    assert [row["output_list"] for row in rows] == [[PROGRAM]] * 3


VOCABULARY = """
ENCODING_CONSTRUCTORS = {
    "o200k_base": lambda: {
        "name": "bytes",
        "pat_str": "(?s).",
        "mergeable_ranks": {bytes([i]): i for i in range(256)},
        "special_tokens": {},
    }
}
"""
HARD = ["How many apples?", "Write a list.", "Why is it *so*?"]
STORY = "Write a story."


def baseline_answer(number: int, model: str) -> dict:
    """Its counts differ from question to question, as the harness's regression needs."""
    metadata = {"token_len": 10 + 7 * number, "header_count": {"h1": number % 2}}
    metadata |= {"list_count": {"ordered": number % 3}, "bold_count": {"**": number // 2}}
    message = {"role": "assistant", "content": {"answer": f"the {model} answer"}}
    return {"uid": f"q{number}", "model": model, "messages": [message], "metadata": metadata}


def test_arena_hard(server, judge, tmp_path):
    copy = copy_of("arena-hard-auto", tmp_path, "data")
    data = copy / "data" / "arena-hard-v2.0"
    (data / "model_answer").mkdir(parents=True)
    questions = [
        {"uid": f"q{number}", "category": "creative_writing" if words == STORY else "hard_prompt", "prompt": words}
        for number, words in enumerate([*HARD, STORY])
    ]
    write_lines(data / "question.jsonl", questions)
    for model in ("o3-mini-2025-01-31", "gemini-2.0-flash-001"):
        rows = [baseline_answer(number, model) for number in range(len(questions))]
        write_lines(data / "model_answer" / f"{model}.jsonl", rows)
    (copy / "tiktoken_ext").mkdir()  # where tiktoken looks for vocabularies: it need not download one
    (copy / "tiktoken_ext" / "openai_public.py").write_text(VOCABULARY)
    answers = {
        one["uid"]: answer(server, "qwen_talker", [{"role": "user", "content": one["prompt"]}]) for one in questions
    }
    assert len(set(answers.values())) == len(questions)

    def rule(asked: str) -> str:
        """The model wins but for the story."""
        (place,) = [one["uid"] for one in questions if one["prompt"] in asked]
        first, _ = re.findall(r"Start of Assistant .'s Answer\|>\n(.*?)\n<\|The End", asked, re.DOTALL)
        wins = (first == answers[place]) == (STORY not in asked)
        return f"My final verdict is: [[{'A>B' if wins else 'B>A'}]]"

    environment = {"OPENAI_BASE_URL": judge(rule, [])}
    printed = run_recipe("Arena-Hard v2", "arena-hard-auto", copy, server, "qwen_talker", **environment)
    written = read_rows(data / "model_answer" / "qwen_talker.jsonl")
    assert {row["uid"]: row["messages"][-1]["content"]["answer"] for row in written} == answers
    judgments = read_rows(data / "model_judgment" / "gpt-4.1" / "qwen_talker.jsonl")
    assert {row["uid"]: [game["score"] for game in row["games"]] for row in judgments} == {
        one["uid"]: ["A>B", "B>A"] if one["prompt"] == STORY else ["B>A", "A>B"] for one in questions
    }
    scores = re.findall(r"^\d +qwen_talker +([\d.]+) ", printed, re.MULTILINE)
    assert scores[0] == "100.0" and float(scores[1]) > 90 and len(scores) == 2, printed
    assert printed.count("Category: hard_prompt") == 2 and "Number of null judgments found: 0" in printed


TURNS = [
    ("math", ["What is 2 + 3?", "Add 4."]),
    ("extraction", ["Which animals are in 'a cat and a dog'?", "Which is first?"]),
]
ASSISTANT = {"role": "system", "content": "You are a helpful assistant."}


def test_mt_bench(server, judge, tmp_path):
    copy = copy_of("FastChat", tmp_path, "mt_bench")
    data = copy / "fastchat" / "llm_judge" / "data" / "mt_bench"
    (data / "reference_answer").mkdir(parents=True)
    questions = [{"question_id": 81 + n, "category": one, "turns": turns} for n, (one, turns) in enumerate(TURNS)]
    write_lines(data / "question.jsonl", questions)
    reference = [{"question_id": 81, "choices": [{"index": 0, "turns": ["It is five.", "It is nine."]}]}]
    write_lines(data / "reference_answer" / "gpt-4.jsonl", reference)
    answers, asked = {}, []
    for one in questions:
        messages, answers[one["question_id"]] = [ASSISTANT], []
        for words in one["turns"]:
            messages.append({"role": "user", "content": words})
            answers[one["question_id"]].append(answer(server, "qwen_talker", messages))
            messages.append({"role": "assistant", "content": answers[one["question_id"]][-1]})

    def rule(words: str) -> str:
        """9 for first turns, and 4 for second ones."""
        return f"Not bad. Rating: [[{4 if 'Conversation with User' in words else 9}]]"

    environment = {"OPENAI_API_BASE": judge(rule, asked)}
    printed = run_recipe("MT-Bench", "FastChat", copy, server, "qwen_talker", **environment)
    assert len(asked) == 4
    written = read_rows(data / "model_answer" / "qwen_talker.jsonl")
    assert {row["question_id"]: row["choices"][0]["turns"] for row in written} == answers
    for one in questions:
        first, second = sorted((words for words in asked if one["turns"][0] in words), key=rule)[::-1]
        whole = [*one["turns"], *answers[one["question_id"]]]
        assert [text in first for text in whole] == [True, False] * 2 and all(text in second for text in whole)
        assert all(("It is five." in words) == (one["category"] == "math") for words in (first, second))
    assert len(read_rows(data / "model_judgment" / "gpt-4_single.jsonl")) == 4
    assert re.search(r"Average ##########\n +score\nmodel +\nqwen_talker +6\.5\n", printed), printed
