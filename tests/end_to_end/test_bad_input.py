"""Whatever is wrong with the input, the user reads one line that says where, and finds nothing half-written."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
import yaml

from megatron_dtrpo.cli import train
from tests.support.launch import TINY_MODEL, flags, latest_iteration, read_metrics, run, uneven_pairs, write_lines

pytestmark = pytest.mark.end_to_end

SETTINGS = {**TINY_MODEL, "seq_length": 2048, "global_batch_size": 4, "train_iters": 2, "save_interval": 2, "lr": 1e-3}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return uneven_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 12)


@pytest.fixture
def settings(pairs, tmp_path) -> dict:
    return {**SETTINGS, "data_path": pairs, "save": tmp_path / "run"}


@pytest.fixture
def error_of(capfd) -> Callable[[dict], str]:
    """Settings -> the one line that a run with them ends with."""

    def error(settings: dict) -> str:
        capfd.readouterr()
        status = train.main(flags(settings))
        lines = capfd.readouterr().err.splitlines()
        assert status not in (0, None)
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0].removeprefix("error: ")

    return error


@pytest.fixture(scope="module")
def checkpoint(pairs, tmp_path_factory) -> Path:
    """A run folder with the checkpoint of iteration 2."""
    save = tmp_path_factory.mktemp("checkpoint") / "run"
    assert train.main(flags({**SETTINGS, "data_path": pairs, "save": save})) == 0
    return save


# --- data files


GOOD = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
BAD_ROWS = {
    "malformed": ('{"prompt": "1+1=", "chosen": "2", "rejec', "not valid JSON"),
    "missing field": (json.dumps({"prompt": "1+1=", "chosen": "2"}), "missing field 'rejected'"),
    "empty chosen": (json.dumps({**GOOD, "chosen": ""}), "chosen: is empty"),
    "equal": (json.dumps({**GOOD, "rejected": "2"}), "chosen and rejected are the same"),
}


def with_third_row(path: Path, row: str) -> Path:
    write_lines(path, [GOOD, GOOD])
    with path.open("a") as file:
        file.write(row + "\n" + json.dumps(GOOD) + "\n")
    return path


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row(settings, error_of, tmp_path, name):
    row, problem = BAD_ROWS[name]
    data = with_third_row(tmp_path / "bad.jsonl", row)
    assert error_of({**settings, "data_path": data}).startswith(f"{data}:3: {problem}")
    assert not settings["save"].exists()


def test_bad_rows_are_skipped_and_named_in_every_start(settings, error_of, tmp_path, capfd):
    """The second start reads the tokens that the first one left, and says the same."""
    data = write_lines(tmp_path / "bad.jsonl", [GOOD, {**GOOD, "chosen": ""}, GOOD, {"prompt": "x"}, GOOD])
    heldout = write_lines(tmp_path / "heldout.jsonl", [GOOD, GOOD, {**GOOD, "rejected": 3}])
    settings = {**settings, "data_path": data, "bad_rows": "skip", "eval_data_path": heldout, "eval_interval": 2}
    expected = [
        f"warning: skipped 2 of 5 rows that cannot be used: {data}:2: chosen: is empty; give some text or take the row "
        f"out | {data}:4: missing field 'chosen'; the row has prompt",
        f"warning: eval_data_path: skipped 1 of 3 rows that cannot be used: {heldout}:3: rejected: must be text or",
    ]
    for iterations in (2, 3):
        assert train.main(flags({**settings, "train_iters": iterations})) == 0
        output = capfd.readouterr().out
        assert all(line in output for line in expected), output
    assert latest_iteration(settings["save"]) == 3
    assert error_of({**settings, "train_iters": 4, "bad_rows": "error"}).startswith(f"{heldout}:3: rejected: must be")


def test_a_folder_of_several_files_or_splits(settings, error_of, tmp_path, capfd):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train_1", "train_2"):
        write_lines(data / f"{name}.jsonl", [GOOD, GOOD])
    assert train.main(flags({**settings, "data_path": data, "train_iters": 1})) == 0
    output = capfd.readouterr().out
    assert "starting: 4 examples" in output
    assert f"note: {data} is 2 files: train_1.jsonl, train_2.jsonl" in output
    write_lines(data / "test.jsonl", [{**GOOD, "prompt": "held out"}] * 2)
    settings |= {"data_path": data, "train_iters": 1, "save": tmp_path / "again"}
    assert "holds files of several splits (test: test.jsonl; train: train_1.jsonl, " in error_of(settings)
    assert not settings["save"].exists()
    heldout = {"split": "train", "eval_data_path": data, "eval_interval": 1, "eval_split": "test"}
    assert train.main(flags({**settings, **heldout})) == 0
    assert "starting: 4 examples" in capfd.readouterr().out


def test_bad_row_leaves_what_was_there(settings, error_of, tmp_path):
    settings["save"].mkdir()
    (settings["save"] / "notes.txt").write_text("mine")
    data = with_third_row(tmp_path / "bad.jsonl", "{")
    error_of({**settings, "data_path": data})
    assert [p.name for p in settings["save"].iterdir()] == ["notes.txt"]


def test_no_such_file(settings, error_of, tmp_path):
    assert str(tmp_path / "none.jsonl") in error_of({**settings, "data_path": tmp_path / "none.jsonl"})
    assert not settings["save"].exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_bad_row_under_torchrun(settings, tmp_path):
    """Only the first process reads the file; the other one must neither wait for it nor complain."""
    data = with_third_row(tmp_path / "bad.jsonl", "{")
    result = run({**settings, "data_path": data, "tensor_model_parallel_size": 2}, tmp_path / "log", processes=2)
    assert result.status != 0
    assert len(result.errors) == 1 and f"{data}:3:" in result.errors[0], result.output
    assert "[rank" not in result.output, "a process ended with a traceback of its own"
    assert not settings["save"].exists()


@pytest.fixture
def overlong(settings, tmp_path) -> dict:
    """Settings with one pair, the third, that packs into more tokens than the budget."""
    data = with_third_row(tmp_path / "long.jsonl", json.dumps({**GOOD, "chosen": "2" * 400}))
    return {**settings, "data_path": data, "seq_length": 256, "train_iters": 1}


def test_overlong_pair_is_skipped_and_counted(overlong, capfd):
    assert train.main(flags(overlong)) == 0
    assert "warning: skipped 1 of 4 examples: longer than seq_length 256" in capfd.readouterr().out
    assert len(read_metrics(overlong["save"])) == 1


def test_overlong_pair_is_an_error_if_wanted(overlong, error_of):
    assert error_of({**overlong, "overlong": "error"}).startswith(f"{overlong['data_path']}:3: packs into ")
    # The tokens are complete and serve the next run; nothing else is there.
    assert [p.name for p in overlong["save"].iterdir()] == ["data_cache"]
    (cache,) = (overlong["save"] / "data_cache").iterdir()
    names = ["discarded.int32", "ends.int64", "meta.json", "rows.int64", "tokens.int32", "turns.int64"]
    assert sorted(p.name for p in cache.iterdir()) == names


# --- settings


def test_unknown_key(settings, error_of, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("hiden_size: 32\n")
    error = error_of({"config": config, **settings})
    assert str(config) in error and "hiden_size" in error and "hidden_size" in error
    assert not settings["save"].exists()


def test_unknown_flag(settings, error_of):
    error = error_of({**settings, "learning_rat": 1})
    assert "--learning-rat" in error and not settings["save"].exists()


@pytest.mark.parametrize(
    "key, divisor",
    [("num_attention_heads", "tensor_model_parallel_size"), ("num_layers", "pipeline_model_parallel_size")],
)
def test_indivisible(settings, error_of, monkeypatch, key, divisor):
    monkeypatch.setenv("WORLD_SIZE", "3")  # settings are checked before processes meet
    assert error_of({**settings, divisor: 3}).startswith(f"{key} 4 is not divisible by {divisor} 3")
    assert not settings["save"].exists()


def sentencepiece_without_mask(path: Path) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["1 + 1 = 2", "2 + 2 = 4"]),
        model_writer=model,
        vocab_size=280,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    path.write_bytes(model.getvalue())
    return path


def test_tokenizer_without_mask_token(settings, error_of, tmp_path):
    model = sentencepiece_without_mask(tmp_path / "plain.model")
    error = error_of({**settings, "tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": model})
    assert str(model) in error and "mask token" in error and "--mask-token" in error
    assert not settings["save"].exists()


def test_a_vocabulary_smaller_than_the_tokenizers(settings, error_of):
    """The rows that pad it would hold all of its tokens, and are none."""
    error = error_of({**settings, "vocab_size": 200})
    assert error == "the tokenizer has 259 tokens, the model 200: they do not belong together"
    assert not settings["save"].exists()


# --- checkpoints


def test_load_of_another_architecture(settings, error_of, checkpoint):
    error = error_of({**settings, "load": checkpoint, "hidden_size": 64})
    other = f"{checkpoint}: checkpoint of another architecture: hidden_size is 32 there, 64 here: leave hidden_size out"
    assert error == other
    assert not settings["save"].exists()


def contents(folder: Path) -> dict[str, int]:
    """Every file but the token caches, which only ever gain complete ones, and its time of change."""
    files = [path for path in folder.rglob("*") if path.is_file() and "data_cache" not in path.parts]
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_resume_of_another_architecture(settings, error_of, checkpoint):
    before = contents(checkpoint)
    error = error_of({**settings, "save": checkpoint, "num_layers": 2, "train_iters": 4})
    assert error == (
        f"{checkpoint}: checkpoint of another architecture: num_layers is 4 there, 2 here: to go on with this run give "
        "num_layers 4"
    )
    assert contents(checkpoint) == before


def test_weights_of_another_architecture(settings, error_of, checkpoint, tmp_path):
    """The weights are not what model_config.yaml beside them says."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    model = yaml.safe_load((copy / "model_config.yaml").read_text())
    (copy / "model_config.yaml").write_text(yaml.safe_dump({**model, "ffn_hidden_size": 128}))
    error = error_of({**settings, "load": copy, "ffn_hidden_size": 128})
    assert error.startswith(f"{copy / 'iter_0000002'}: does not load into this model")
    assert not list(settings["save"].glob("iter_*")) and not (settings["save"] / "metrics.jsonl").exists()


def test_load_of_a_folder_without_checkpoint(settings, error_of, tmp_path):
    assert str(tmp_path / "empty") in error_of({**settings, "load": tmp_path / "empty"})
    assert not settings["save"].exists()


# --- numbers that are not finite


def test_nan_names_the_pairs_that_have_it(settings, error_of, tmp_path, monkeypatch):
    """One token's embedding is NaN, and only the sixth pair, in the second step, has that token. Each pair is a
    sequence of its own here: masked attention multiplies NaN by zero, so that pairs packed together share it."""
    from megatron_dtrpo.training import engine

    def poisoned(model, seed, initialize=engine.initialize_weights):
        initialize(model, seed)
        with torch.no_grad():
            model.embedding.word_embeddings.weight[ord("~")] = float("nan")

    monkeypatch.setattr(engine, "initialize_weights", poisoned)
    rows = [{**GOOD, "prompt": f"{'~' if number == 6 else number}+1="} for number in range(1, 9)]
    data = write_lines(tmp_path / "pairs.jsonl", rows)
    settings |= {"data_path": data, "shuffle": False, "micro_batch_size": 1, "save_interval": 1, "train_iters": 4}
    error = error_of(settings)
    assert error == f"loss is nan at iteration 2 on {data}:6; the checkpoint of iteration 1 is kept"
    assert latest_iteration(settings["save"]) == 1
    assert [row["iteration"] for row in read_metrics(settings["save"])] == [1]


def test_nan_gradient_without_clipping(settings, error_of, monkeypatch):
    """The loss is finite, its gradient is not: caught in that step, even where gradients are not clipped."""
    from megatron_dtrpo.training import passes

    def poisoned(chunks, batches, objective, run_pass=passes.train_pass):
        outcomes = run_pass(chunks, batches, objective)
        next(iter(chunks[0].module.parameters())).main_grad[0, 0] = float("nan")
        return outcomes

    monkeypatch.setattr(passes, "train_pass", poisoned)
    error = error_of({**settings, "clip_grad": 0, "save_interval": 1})
    assert error.startswith("gradient norm is nan at iteration 1 on ") and str(settings["data_path"]) in error
    assert error.endswith("no checkpoint was written yet")
    assert not list(settings["save"].glob("iter_*"))


# --- steps without a gradient


def test_a_step_that_trains_nothing(settings, error_of, monkeypatch):
    """Recomputation as megatron-core has it: nothing that enters the first layer requires a gradient."""
    from megatron_dtrpo.model.gpt import BlockDiffusionGPTModel

    def plain(self, tokens, position):
        return self.embedding(input_ids=tokens[None], position_ids=position[None])

    monkeypatch.setattr(BlockDiffusionGPTModel, "_embedded", plain)
    error = error_of({**settings, "trainable_modules": ["mlp"], "recompute_granularity": "full", "save_interval": 1})
    assert error.startswith("gradient norm is 0 at iteration 1: ")
    assert "trainable_modules" in error and "recompute_granularity" in error
    assert error.endswith("no checkpoint was written yet") and not list(settings["save"].glob("iter_*"))


def test_a_step_that_asks_for_nothing(settings, tmp_path):
    """Two tokens to learn, neither of which is masked in about every third step: that has no gradient."""
    data = write_lines(tmp_path / "sft.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    settings |= {"data_path": data, "objective": "sft", "complementary": False, "global_batch_size": 1}
    assert train.main(flags({**settings, "train_iters": 8})) == 0
    norms = [row["grad_norm"] for row in read_metrics(settings["save"])]
    assert len(norms) == 8 and 0 < sum(norm == 0 for norm in norms) < 8


@pytest.mark.slow
@pytest.mark.distributed
def test_diverged_run_keeps_its_last_checkpoint(settings, checkpoint, tmp_path):
    """A learning rate of 1e30 blows the weights up in step 3 of a good run, spread over two pipeline stages."""
    save = shutil.copytree(checkpoint, tmp_path / "copy")
    settings |= {"save": save, "train_iters": 6, "save_interval": 10}
    result = run({**settings, "lr": 1e30, "pipeline_model_parallel_size": 2}, tmp_path / "log", processes=2)
    assert result.status != 0 and len(result.errors) == 1, result.output
    assert "[rank" not in result.output, "a process ended with a traceback of its own"
    assert " at iteration 4 on " in result.errors[0] and f"{settings['data_path']}:" in result.errors[0]
    assert result.errors[0].endswith("the checkpoint of iteration 2 is kept")
    assert [p.name for p in save.glob("iter_*")] == ["iter_0000002"] and latest_iteration(save) == 2

    assert train.main(flags(settings)) == 0
    assert [row["iteration"] for row in read_metrics(save)] == [1, 2, 3, 4, 5, 6]
    assert latest_iteration(save) == 6
