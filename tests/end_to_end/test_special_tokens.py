"""--eos-token and --mask-token beside --load: applied, refused where unknown, recorded, kept and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from megatron_dtrpo.cli import generate, train
from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
from megatron_dtrpo.data.token_store import TokenStore
from megatron_dtrpo.data.tokenizer import build_tokenizer, load_tokenizer
from tests.support import conversion_folders as folders
from tests.support.conversion_folders import refused, run_tool
from tests.support.launch import flags, write_lines

pytestmark = pytest.mark.end_to_end

END, OTHER, MASK, OTHER_MASK = "<|im_end|>", "<|endoftext|>", folders.MASK, "<|im_start|>"
SHAPE = {"layers": 1}
MESSAGES = [{"role": "user", "content": "1+1="}]
ROWS = [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}, {"prompt": "2+2=", "chosen": "4", "rejected": "5"}]


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return folders.write_folder(tmp_path_factory.mktemp("special") / "hf", shape=SHAPE, eos_token_id=258)


@pytest.fixture(scope="module")
def base(hf) -> Path:
    import_checkpoint(hf, hf.parent / "base", ImportOptions(progress=False))
    return hf.parent / "base"


@pytest.fixture(scope="module")
def settings(base) -> dict:
    data = write_lines(base.parent / "pairs.jsonl", ROWS)
    return {"load": base, "data_path": data, "seq_length": 256, "global_batch_size": 2, "train_iters": 1, "lr": 1e-3}


TOKENS = {"eos_token": OTHER, "mask_token": OTHER_MASK}


@pytest.fixture(scope="module")
def run(settings, base) -> Path:
    """A run with tokens of its own."""
    save = base.parent / "run"
    assert train.main(flags({**settings, **TOKENS, "save": save})) == 0
    return save


def last_tokens(save: Path) -> set[int]:
    """The tokens that the responses of a run's data end in."""
    (folder,) = (save / "data_cache").iterdir()
    store = TokenStore(folder)
    return {int(response[-1]) for n in range(len(store)) for response in store[n].responses}


def test_the_tokens_are_applied_and_recorded(base, run):
    kept = load_tokenizer(run / "tokenizer")
    assert (kept.eos_token, kept.mask_token) == (OTHER, OTHER_MASK)
    assert last_tokens(run) == {kept.eos_id} == {256}
    record = yaml.safe_load((run / "run_config.yaml").read_text())
    assert (record["eos_token"], record["mask_token"]) == (OTHER, OTHER_MASK)
    assert load_tokenizer(base / "tokenizer").eos_token == END, "the starting point keeps its own"


@pytest.mark.parametrize("key", TOKENS)
@pytest.mark.parametrize("token", ["<|no_such|>", ""])
def test_unknown_tokens_are_refused(settings, tmp_path, capfd, key, token):
    assert train.main(flags({**settings, "save": tmp_path / "run", key: token})) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    flag = "--" + key.replace("_", "-")
    assert len(errors) == 1 and repr(token) in errors[0] and flag in errors[0], errors
    assert not (tmp_path / "run").exists()


def test_resume_keeps_them(settings, run, capfd):
    assert train.main(flags({**settings, "save": run, "train_iters": 2})) == 0
    assert "start: train_iters 1 -> 2\n" in capfd.readouterr().out, "nothing else has changed"
    record = yaml.safe_load((run / "run_config.yaml").read_text())
    assert (record["eos_token"], record["mask_token"]) == (OTHER, OTHER_MASK)
    assert last_tokens(run) == {256}
    # Said again they are the same run; others are another one.
    assert train.main(flags({**settings, **TOKENS, "save": run, "train_iters": 2})) == 0
    capfd.readouterr()
    assert train.main(flags({**settings, **TOKENS, "eos_token": END, "save": run, "train_iters": 3})) == 2
    assert f"this run has eos_token {OTHER}, not {END}" in capfd.readouterr().err


def test_a_new_run_takes_them_over(settings, run, tmp_path):
    """``--load RUN`` has the run's own tokens without being told."""
    assert train.main(flags({**settings, "load": run, "save": tmp_path / "next"})) == 0
    assert last_tokens(tmp_path / "next") == {256}


def test_decoding_uses_them(run, monkeypatch):
    used = []

    def record(session, prompts, options, **arguments):
        used.append((session.tokenizer.eos_token, session.tokenizer.mask_token))
        raise KeyboardInterrupt

    from megatron_dtrpo.evaluation import generation

    monkeypatch.setattr(generation, "decode_prompts", record)
    generate.main(["--checkpoint", str(run), "--prompt", "1+1="])
    assert used == [(OTHER, OTHER_MASK)]


def test_export_writes_them(run, tmp_path, capsys):
    status, printed = run_tool(capsys, "export", "--megatron-path", run, "--hf-path", tmp_path / "hf")
    assert status == 0 and f"the end token is {OTHER}" in printed and f"the mask token is {OTHER_MASK}" in printed
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.eos_token_id, theirs.mask_token) == (256, OTHER_MASK)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [256, 258]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 256
    assert build_tokenizer("HuggingFaceTokenizer", tmp_path / "hf", OTHER_MASK).eos_token == OTHER
    assert f"--mask-token '{OTHER_MASK}'" in printed, "the usual mask token wins where it is in the vocabulary"


def test_export_of_unchanged_tokens_copies_the_files(base, hf, tmp_path, capsys):
    assert run_tool(capsys, "export", "--megatron-path", base, "--hf-path", tmp_path / "hf")[0] == 0
    ours, theirs = folders.checksums(tmp_path / "hf"), folders.checksums(hf)
    assert {name: ours[name] for name in theirs if not name.endswith("safetensors")} == {
        name: value for name, value in theirs.items() if not name.endswith("safetensors")
    }


def test_import_has_them_as_well(hf, tmp_path, capsys):
    words = ("import", "--hf-path", hf, "--megatron-path", tmp_path / "base")
    refused(capsys, "--eos-token", *words, "--eos-token", "<|no_such|>")
    status, printed = run_tool(capsys, *words, "--eos-token", OTHER)
    assert status == 0, printed
    assert load_tokenizer(tmp_path / "base" / "tokenizer").eos_id == 256
    line = f"note: the chat template ends an answer with {END}, the end token is {OTHER}"
    assert [text for text in printed.splitlines() if text.startswith(line)], printed


def test_another_end_than_the_templates_is_said_once(settings, run, tmp_path, capfd):
    for tokens, expected in (({}, 0), ({"eos_token": OTHER}, 1)):
        save = tmp_path / f"run{expected}"
        assert train.main(flags({**settings, **tokens, "save": save})) == 0
        lines = [line for line in capfd.readouterr().out.splitlines() if "the chat template ends an answer" in line]
        assert len(lines) == expected
    assert f"--eos-token '{END}'" in lines[0]


def test_base_qwen_is_told_about_its_end_token(shared_dir):
    """The real template and vocabulary, with the end token of the base models."""
    folder = shared_dir / "data" / "fast_dllm_v2_7b"
    assert build_tokenizer("HuggingFaceTokenizer", folder, None, END).note_on_end() is None
    note = build_tokenizer("HuggingFaceTokenizer", folder, None, OTHER).note_on_end()
    assert note.startswith(f"the chat template ends an answer with {END}, the end token is {OTHER}")
