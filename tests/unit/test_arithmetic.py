"""The quickstart's data and its two helpers: what they write must be right, reproducible and tokenise cleanly."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

import arithmetic
import plot_run
import train_tokenizer

COUNTS = {"train": 1500, "pairs": 800, "heldout": 300}


@pytest.fixture(scope="module")
def files() -> dict[str, list[dict]]:
    return arithmetic.generate(**COUNTS, seed=7)


def stated_steps(text: str) -> list[tuple[int, str, int, int]]:
    """(left, operation, right, result) of every step that a solution writes down."""
    return [(int(a), op, int(b), int(c)) for a, op, b, c in re.findall(r"(\d+)([+-])(\d+)=(\d+)", text)]


def told_numbers(prompt: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", prompt)]


# The data


def test_counts_and_fields(files):
    assert {name: len(records) for name, records in files.items()} == {
        "sft.jsonl": 1500,
        "pairs_train.jsonl": 800,
        "pairs_heldout.jsonl": 300,
    }
    assert all(set(r) == {"prompt", "completion", "answer"} for r in files["sft.jsonl"])
    assert all(set(r) == {"prompt", "chosen", "rejected", "answer"} for r in files["pairs_heldout.jsonl"])


def test_every_right_solution_is_right(files):
    for record in sum(files.values(), []):
        text = record.get("completion") or record["chosen"]
        steps = stated_steps(text)
        total, *rest = told_numbers(record["prompt"])
        assert len(steps) == len(rest)
        for (left, operation, right, result), number in zip(steps, rest, strict=True):
            assert (left, right) == (total, number)
            total = left + right if operation == "+" else left - right
            assert result == total >= 0
        assert arithmetic.final_answer(text) == total == record["answer"]


def test_every_rejected_solution_is_wrong_and_follows_from_its_mistake(files):
    for record in files["pairs_train.jsonl"] + files["pairs_heldout.jsonl"]:
        steps = stated_steps(record["rejected"])
        assert arithmetic.final_answer(record["rejected"]) == steps[-1][3] != record["answer"]
        assert all(before[3] == after[0] for before, after in zip(steps, steps[1:], strict=False))
        slips = [s for s in steps if s[3] != (s[0] + s[2] if s[1] == "+" else s[0] - s[2])]
        # One mistake: either a slip, or exact arithmetic on the wrong operation or without one of the numbers.
        assert len(slips) <= 1
        if slips:
            chosen = stated_steps(record["chosen"])
            assert [step[1:3] for step in steps] == [step[1:3] for step in chosen]


def test_each_kind_of_mistake_occurs(files):
    slips = left_out = wrong_operation = 0
    for record in files["pairs_train.jsonl"]:
        chosen, rejected = stated_steps(record["chosen"]), stated_steps(record["rejected"])
        if len(rejected) < len(chosen):
            left_out += 1
        elif [step[1] for step in rejected] != [step[1] for step in chosen]:
            wrong_operation += 1
        else:
            slips += 1
    assert min(slips, left_out, wrong_operation) > 0.1 * COUNTS["pairs"]


def test_heldout_problems_are_in_no_other_file(files):
    def key(record):
        text = record.get("completion") or record["chosen"]
        return tuple(told_numbers(record["prompt"])), tuple(step[1] for step in stated_steps(text))

    heldout, others = files["pairs_heldout.jsonl"], files["pairs_train.jsonl"] + files["sft.jsonl"]
    assert not {r["prompt"] for r in heldout} & {r["prompt"] for r in others}
    assert not {key(r) for r in heldout} & {key(r) for r in others}  # not in other words either
    assert len({r["prompt"] for r in heldout + others}) == sum(COUNTS.values())


def test_the_seed_decides(files):
    assert arithmetic.generate(**COUNTS, seed=7) == files
    assert arithmetic.generate(**COUNTS, seed=8) != files
    more = arithmetic.generate(train=10, pairs=5, heldout=300, seed=7)
    assert more["pairs_heldout.jsonl"] == files["pairs_heldout.jsonl"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("37+58=95, 95+6=101. Answer: 101", 101),
        ("Answer:7", 7),
        ("Answer: -3", -3),
        ("Answer: 4. No: Answer: 5", 5),
        ("37+58=95", None),
        ("Answer: ", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert arithmetic.final_answer(text) == answer


def test_command_writes_the_files_on_bare_python(tmp_path):
    # -I -S: no site-packages, so an import beyond the standard library would fail.
    command = [sys.executable, "-I", "-S", arithmetic.__file__, "--output", str(tmp_path / "new" / "data")]
    subprocess.run([*command, "--train", "20", "--pairs", "10", "--heldout", "5"], check=True, capture_output=True)
    lines = (tmp_path / "new" / "data" / "pairs_heldout.jsonl").read_text().splitlines()
    assert len(lines) == 5 and json.loads(lines[0])["chosen"]


def test_command_refuses_bad_counts(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--train", "-1", "--pairs", "1", "--heldout", "1"]
    assert arithmetic.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: --train")


# The tokenizer


@pytest.fixture(scope="module")
def data_file(files, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "all.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in files["sft.jsonl"] + files["pairs_train.jsonl"]))
    return path


@pytest.fixture(scope="module")
def tokenizer(data_file) -> sentencepiece.SentencePieceProcessor:
    output = data_file.parent / "tokenizer"
    assert train_tokenizer.main(["--input", str(data_file), "--output", str(output)]) == 0
    return sentencepiece.SentencePieceProcessor(model_file=str(output / "tokenizer.model"))


def test_prompt_and_completion_tokenise_independently(tokenizer, files):
    for record in files["pairs_heldout.jsonl"]:
        prompt, chosen = tokenizer.encode(record["prompt"]), tokenizer.encode(record["chosen"])
        assert tokenizer.decode(prompt) == record["prompt"]
        assert tokenizer.decode(prompt + chosen) == record["prompt"] + record["chosen"]
        assert len(prompt) <= 32 and len(chosen) <= 32


def test_special_pieces(tokenizer):
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2)
    mask = tokenizer.piece_to_id("[MASK]")
    assert mask != tokenizer.unk_id() and tokenizer.encode("[MASK]") == [mask]
    assert tokenizer.get_piece_size() == 448


def test_digits_are_split_and_bytes_are_the_fallback(tokenizer):
    assert tokenizer.encode("137", out_type=str) == ["1", "3", "7"]
    assert tokenizer.decode(tokenizer.encode("  naïve\n字")) == "  naïve\n字"
    assert tokenizer.unk_id() not in tokenizer.encode("naïve 字")


@pytest.mark.parametrize(
    ("content", "size", "message"),
    [
        (None, "448", "No such file"),
        ("{}\n", "448", "no text in any of the fields"),
        ('{"prompt": "a"}\nnonsense\n', "448", "bad.jsonl:2: not JSON"),
        ("[1]\n", "448", "bad.jsonl:1: expected an object"),
        ('{"prompt": "Tom has 3 apples"}\n', "100000", "--vocab-size 100000: Vocabulary size"),
        ('{"prompt": "Tom has 3 apples"}\n', "5", "--vocab-size 5: Vocabulary size"),
    ],
)
def test_tokenizer_errors_are_one_line(tmp_path, capsys, content, size, message):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    assert train_tokenizer.main(["--input", str(path), "--output", str(tmp_path), "--vocab-size", size]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


# The figure


def write_metrics(directory: Path, preference: bool, iterations: int = 30) -> Path:
    directory.mkdir(parents=True)
    with (directory / "metrics.jsonl").open("w") as file:
        for i in range(1, iterations + 1):
            row = {"iteration": i, "consumed_samples": 8 * i, "loss": 1 / i, "grad_norm": 1.0, "lr": 1e-4}
            if preference:
                row |= {f"rewards/{name}": i / 30 for name in ("chosen", "rejected", "margins", "accuracies")}
                row |= {"logps/chosen": -float(i), "logps/rejected": -2.0 * i}
            file.write(json.dumps(row) + "\n")
    return directory


@pytest.mark.parametrize("kinds", [("sft",), ("dtrpo",), ("sft", "dtrpo"), ("dtrpo", "a/dtrpo")])
def test_plot_writes_a_png(tmp_path, kinds):
    runs = [str(write_metrics(tmp_path / kind, preference="dtrpo" in kind)) for kind in kinds]
    output = tmp_path / "figures" / "run.png"
    assert plot_run.main(["--runs", *runs, "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")


def test_plot_panels_follow_the_kind_of_run(tmp_path):
    runs = [plot_run.read_run(write_metrics(tmp_path / name, name == "dtrpo")) for name in ("sft", "dtrpo")]
    assert [panel.title for panel in plot_run.panels(runs[:1])] == ["SFT loss", "Gradient norm"]
    assert len(plot_run.panels(runs[1:])) == 4
    assert len(plot_run.panels(runs)) == 6


def test_plot_takes_the_later_row_and_leaves_an_unfinished_line(tmp_path):
    run = write_metrics(tmp_path / "run", preference=False, iterations=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "loss": 9.0}\n{"iteration": 4, "lo')
    assert plot_run.read_run(run).series("loss") == ([1, 2, 3], [1.0, 0.5, 9.0])


def test_smoothing_keeps_the_first_value_only():
    smoothed = plot_run.smooth([float(i % 2) for i in range(200)])
    assert len(smoothed) == 200 and smoothed[0] == 0.0
    assert all(0.4 < value < 0.6 for value in smoothed[10:])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "empty"),
        ("{}\n", "metrics.jsonl:1: no number"),
        ("x\n", "metrics.jsonl:1: not JSON"),
    ],
)
def test_plot_errors_are_one_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert plot_run.main(["--runs", str(tmp_path), "--output", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
