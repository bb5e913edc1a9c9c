"""megatron-dtrpo evaluate: the lm-evaluation-harness on tasks from local files, its numbers found in other ways."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from megatron_dtrpo.cli import evaluate, generate, train
from megatron_dtrpo.config.settings import Config
from tests.support.conversion_folders import write_folder
from tests.support.launch import TINY_MODEL, Job, flags, uneven_pairs, verb, write_lines

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]

POSITIONS, NEW = 160, 20
QUESTIONS = ["Tom has 3 apples. ", "x", "sixteen letters!", "Two blocks of eight, and some more. ", "Why? " * 40]
CHOICES = [
    {"question": "The sky is", "choices": [" blue", " green and very bright", " red"], "label": 0},
    {"question": "Two and two are", "choices": [" four", " five", " six apples", " 4"], "label": 3},
    {"question": "y", "choices": [" a", " b"], "label": 1},
    {"question": "The sky is", "choices": [" high", " blue"], "label": 1},
]
PAGES = ["A short page.", "A page that does not fit the model at once: " + "words, words, " * 15]
DECODING = {"threshold": 0.5, "small_block_size": 4}
SCORING = {"estimator": "dtrpo", "num_views": 2, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of random weights, what it answers to the questions, and three tasks about it."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = uneven_pairs(folder / "pairs.jsonl", 4)
    model = {**TINY_MODEL, "max_position_embeddings": POSITIONS, "init_method_std": 0.5}
    run = {"seq_length": 2048, "global_batch_size": 4, "train_iters": 1, "lr": 1e-9}
    assert train.main(flags({**model, **run, "data_path": data, "save": folder / "run"})) == 0

    # A question that is too long loses its beginning.
    write_lines(folder / "prompts.jsonl", [{"prompt": text[-(POSITIONS - NEW) :]} for text in QUESTIONS])
    files = {"checkpoint": folder / "run", "prompts": folder / "prompts.jsonl", "output": folder / "answers.jsonl"}
    assert generate.main(flags({**files, "max_new_tokens": NEW, **DECODING})) == 0
    answers = [json.loads(line)["completion"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    stop = next(answer[9] for answer in answers if len(answer) > 9)  # its second block is not written for nothing
    truth = [answer.split(stop)[0] for answer in answers]
    wrong = 1  # the task says something else about this one
    rows = [
        {"question": question, "answer": "something else" if n == wrong else answer}
        for n, (question, answer) in enumerate(zip(QUESTIONS, truth, strict=True))
    ]
    (folder / "truth.json").write_text(json.dumps({"answers": answers, "truth": truth, "stop": stop}))

    (folder / "tasks").mkdir()
    generation = {"until": [stop, "<eos>"], "max_gen_toks": NEW, "do_sample": False}
    write_task(
        folder,
        "local_generation",
        rows,
        "exact_match",
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs=generation,
    )
    write_task(
        folder,
        "local_choice",
        CHOICES,
        "acc",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="label",
        target_delimiter="",
    )
    write_task(
        folder,
        "local_pages",
        [{"page": page} for page in PAGES],
        "bits_per_byte",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{page}}",
    )
    write_task(
        folder,
        "local_code",
        rows,
        "exact_match",
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        unsafe_code=True,
    )
    return folder


def write_task(folder: Path, name: str, rows: list[dict], metric: str, **settings) -> None:
    data = write_lines(folder / f"{name}.jsonl", rows)
    source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    aggregation = "mean" if metric != "bits_per_byte" else metric
    metrics = [{"metric": metric, "aggregation": aggregation, "higher_is_better": metric != "bits_per_byte"}]
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"}
    task |= {"metric_list": metrics, "metadata": {"version": 1.0}, **settings}
    (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task, allow_unicode=False))


ALL = "local_generation,local_choice,local_pages"


def settings_of(folder: Path, name: str, **settings) -> dict:
    files = {"checkpoint": folder / "run", "include_path": folder / "tasks", "output": folder / f"{name}.json"}
    return {**files, "tasks": ALL, "log_samples": True, **DECODING, **SCORING, **settings}


def run_tool(folder: Path, name: str, **settings) -> dict:
    settings = settings_of(folder, name, **settings)
    assert evaluate.main(flags(settings)) == 0
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def results(folder) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK", raising=False)
        return run_tool(folder, "alone", table=folder / "table.md")


def test_the_row_of_the_papers_table(folder, results):
    head, _, row = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, row)]
    row = dict(zip(*cells, strict=True))
    assert row.pop("model") == str(folder / "run")
    assert set(row.values()) == {"–"} and "GSM8K" in row  # of the table no task is among them


def answers_of(results: dict, task: str) -> list:
    """Of every document, in order: the answers of the model."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [[answer[0] for answer in sample["resps"]] for sample in samples]


def same(results: dict, others: dict) -> None:
    assert answers_of(results, "local_generation") == answers_of(others, "local_generation")
    for task in ("local_choice", "local_pages"):
        for mine, theirs in zip(answers_of(results, task), answers_of(others, task), strict=True):
            for one, other in zip(mine, theirs, strict=True):
                one, other = (x if isinstance(x, list) else [x, False] for x in (one, other))
                assert one[0] == pytest.approx(other[0], rel=1e-4)
                assert one[1] == other[1]


def one_at_a_time(folder: Path, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """Every continuation alone in its packed sequence."""
    from megatron_dtrpo.data.batches import Noising
    from megatron_dtrpo.data.micro_batch import MicroBatch, Sample
    from megatron_dtrpo.evaluation.likelihood import content_key
    from megatron_dtrpo.evaluation.session import locate_checkpoint

    config = Config.from_flat(SCORING)
    with locate_checkpoint(folder / "run", config) as source, source.open() as engine:
        noising = Noising.from_config(config, engine.tokenizer.mask_id)
        found = []
        for context, ids in pairs:
            sample = Sample(0, content_key(context))
            document = noising.document(sample, torch.tensor(context), [torch.tensor(ids)])
            found.append(engine.score([MicroBatch(document, [], torch.tensor([len(ids)]))])[0].item())
    return found


def test_generation_is_that_of_generate(folder, results):
    known = json.loads((folder / "truth.json").read_text())
    assert [text for (text,) in answers_of(results, "local_generation")] == known["truth"]
    assert known["truth"] != known["answers"]  # the stop string did stop something
    expected = (len(QUESTIONS) - 1) / len(QUESTIONS)
    assert results["results"]["local_generation"]["exact_match,none"] == pytest.approx(expected)
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    tokens, passes = sum(len(row["completion_ids"]) for row in rows), sum(row["completion_passes"] for row in rows)
    found = results["efficiency"]
    assert 1 < found["completions/mean_length"] <= tokens / len(rows)  # a stop string ends the decoding, too
    assert 1 < found["completions/mean_passes"] <= passes / len(rows)
    per_pass = found["completions/mean_length"] / found["completions/mean_passes"]
    assert found["completions/tokens_per_pass"] == pytest.approx(per_pass)


def test_likelihoods_are_those_of_one_at_a_time(folder, results):
    pairs = [(list(c["question"].encode()), list(choice.encode())) for c in CHOICES for choice in c["choices"]]
    expected = iter(one_at_a_time(folder, pairs))
    right = 0
    for document, answers in zip(CHOICES, answers_of(results, "local_choice"), strict=True):
        scores = [next(expected) for _ in document["choices"]]
        assert [score for score, _ in answers] == pytest.approx(scores, rel=1e-4)
        right += max(range(len(scores)), key=scores.__getitem__) == document["label"]
    assert results["results"]["local_choice"]["acc,none"] == right / len(CHOICES)


def test_pages_are_scored_in_windows(folder, results):
    room = POSITIONS - 1
    total = 0.0
    for page, (answer,) in zip(PAGES, answers_of(results, "local_pages"), strict=True):
        ids = list(page.encode())
        rest = len(ids) - room
        windows = [([256], ids[:room])]  # after an end token
        if rest > 0:  # what is left, less than a window of it, after all that fits before it
            windows.append((ids[len(ids) - POSITIONS : -rest], ids[-rest:]))
        assert answer == pytest.approx(sum(one_at_a_time(folder, windows)), rel=1e-4)
        total += answer
    size = sum(len(page.encode()) for page in PAGES)
    assert results["results"]["local_pages"]["bits_per_byte,none"] == pytest.approx(-total / math.log(2) / size)


def test_neither_the_batch_nor_the_packing_matters(folder, results):
    same(run_tool(folder, "single", batch_size=1, seq_length=64), results)


@pytest.mark.distributed
def test_two_processes_agree_with_one(folder, results):
    settings = settings_of(folder, "tp2", tensor_model_parallel_size=2)
    result = Job(settings, folder / "tp2.log", 2, verb("evaluate")).wait()
    assert result.status == 0, result.output
    same(json.loads((folder / "tp2.json").read_text()), results)
    assert result.output.count("|local_choice") == 1  # one process reports
    result = Job(settings_of(folder, "dp2"), folder / "dp2.log", 2, verb("evaluate")).wait()
    assert result.status == 0, result.output
    same(json.loads((folder / "dp2.json").read_text()), results)


def test_flags_replace_what_the_task_says(folder, results, capfd):
    changed = run_tool(folder, "sampled", tasks="local_generation", temperature=1.0, max_new_tokens=9)
    lengths = [len(text) for (text,) in answers_of(changed, "local_generation")]
    assert max(lengths) <= 9
    again = run_tool(folder, "again", tasks="local_generation", temperature=1.0, max_new_tokens=9, batch_size=2)
    assert answers_of(again, "local_generation") == answers_of(changed, "local_generation")
    out = capfd.readouterr()
    assert "warning: 1 prompts are too long" in out.err and "|local_generation|" in out.out


def test_greedy_is_what_is_decoded(folder):
    from megatron_dtrpo.config.decoding import DecodingOptions
    from megatron_dtrpo.data.batches import Noising
    from megatron_dtrpo.evaluation.harness import HarnessModel, HarnessOptions
    from megatron_dtrpo.evaluation.session import locate_checkpoint

    written = [json.loads(line)["completion_ids"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    contexts = [list(question[-(POSITIONS - NEW) :].encode()) for question in QUESTIONS]
    config = Config.from_flat(SCORING)
    with locate_checkpoint(folder / "run", config) as source, source.open() as engine:
        noising = Noising.from_config(config, engine.tokenizer.mask_id)
        options = HarnessOptions(DecodingOptions(NEW, **DECODING), check_greedy=True)
        model = HarnessModel(engine, noising, options)
        right = [("", context, ids) for context, ids in zip(contexts, written, strict=True)]
        wrong = [("", context, [*ids[:-1], ids[-1] ^ 1]) for _, context, ids in right]
        nothing = [("", contexts[0], [])]
        with model.rank_zero.calling():
            answers = model._loglikelihood_tokens(right + wrong + nothing)
    assert [greedy for _, greedy in answers] == [True] * len(right) + [False] * len(wrong) + [True]
    assert answers[-1][0] == 0.0 and all(score < 0 for score, _ in answers[:-1])


def test_likelihoods_of_an_autoregressive_model_are_exact(folder):
    """By default, and as transformers has them. No --estimator, no --threshold: neither has anything to choose."""
    from transformers import AutoModelForCausalLM

    from megatron_dtrpo.conversion.to_huggingface import ExportOptions, export_checkpoint

    model = {**TINY_MODEL, "block_size": 1, "make_vocab_size_divisible_by": 1, "init_method_std": 0.5}
    run = {"seq_length": 2048, "global_batch_size": 4, "train_iters": 1, "lr": 1e-9, "save": folder / "next_token"}
    assert train.main(flags({**model, **run, "data_path": folder / "pairs.jsonl"})) == 0
    files = {"checkpoint": folder / "next_token", "include_path": folder / "tasks", "output": folder / "next.json"}
    assert evaluate.main(flags({**files, "tasks": "local_choice,local_generation", "log_samples": True})) == 0
    results = json.loads((folder / "next.json").read_text())
    assert results["config"]["model_args"]["estimator"] == "exact"
    assert results["efficiency"]["completions/tokens_per_pass"] == 1

    export_checkpoint(folder / "next_token", folder / "next_token_hf", ExportOptions(progress=False))
    peer = AutoModelForCausalLM.from_pretrained(folder / "next_token_hf", dtype=torch.float32)
    for document, answers in zip(CHOICES, answers_of(results, "local_choice"), strict=True):
        for choice, (score, _) in zip(document["choices"], answers, strict=True):
            ids = torch.tensor(list((document["question"] + choice).encode()))
            first = len(document["question"].encode())
            with torch.no_grad():
                log_probs = torch.log_softmax(peer(input_ids=ids[None]).logits[0, first - 1 : -1], -1)
            assert score == pytest.approx(log_probs.gather(1, ids[first:, None]).sum().item(), rel=1e-4)


def test_huggingface_folder_with_a_chat_template(folder, capfd):
    write_folder(folder / "hf")
    changed = run_tool(
        folder,
        "chat",
        checkpoint=folder / "hf",
        tasks="local_generation,local_choice",
        apply_chat_template=True,
        num_fewshot=0,
        max_new_tokens=8,
    )
    prompt = changed["samples"]["local_generation"][1]["arguments"][0][0]
    assert prompt == "<|im_start|>user\nx<|im_end|>\n"
    assert len(answers_of(changed, "local_choice")) == len(CHOICES)


ERRORS = {
    "unknown task": (
        {"tasks": "local_generatoin"},
        "--tasks local_generatoin: the harness has no such task; near ones: local_generation",
    ),
    "no task": ({"tasks": ","}, "--tasks is empty"),
    "code": ({"tasks": "local_code"}, "task local_code runs code that the model wrote: add --confirm-run-unsafe-code"),
    "no such checkpoint": ({"checkpoint": "nowhere"}, "--checkpoint nowhere: no such folder"),
    "no template": ({"apply_chat_template": True}, "no chat template"),
    "no room": ({"max_new_tokens": POSITIONS}, f"max_gen_toks {POSITIONS}: the model has {POSITIONS} positions"),
    "limit": ({"limit": -1}, "--limit -1.0"),
    "output": ({"output": "no/folder/x.json"}, "its folder does not exist"),
    "estimator": ({"estimator": "sft"}, "invalid choice: 'sft'"),
    "views without noise": ({"estimator": "mean_field"}, "num_views is 2"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, capfd, name):
    changes, message = ERRORS[name]
    if name == "unknown task":  # reading the harness's own tasks takes ten seconds
        from lm_eval.tasks import TaskManager

        small = lambda **given: TaskManager(**{**given, "include_defaults": False})  # noqa: E731
        monkeypatch.setattr("lm_eval.tasks.TaskManager", small)
    settings = settings_of(folder, "none", tasks="local_generation", output=tmp_path / "none.json") | changes
    capfd.readouterr()
    assert evaluate.main(flags(settings)) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], lines
    assert not list(tmp_path.iterdir())
