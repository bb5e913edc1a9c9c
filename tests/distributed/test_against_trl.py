"""The autoregressive limit is DPO: with block size 1, runs from an imported Qwen2 are those of TRL's `DPOTrainer` on
the same weights, pairs and settings. And what the other verbs do with such a run, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_dtrpo.conversion.to_huggingface import ExportOptions, export_checkpoint
from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
from tests.support import conversion_folders as folders
from tests.support.launch import read_rows, uneven_pairs, verb_runner, write_lines

pytest.importorskip("trl", minversion="1.16")
pytestmark = pytest.mark.distributed

# As Qwen2.5's, the vocabulary is a multiple of 128.
SHAPE = dict(layers=2, hidden=32, ffn=48, heads=4, groups=2, width=8, vocabulary=384)
LOSSES = ["sigmoid", "ipo"]
STEPS, PAIRS, LR, BETA, EPSILON = 5, 4, 1e-3, 0.1, 1e-5
SETTINGS = {
    "seq_length": 2048,
    "micro_batch_size": 3,  # a step is two packed sequences
    "global_batch_size": PAIRS,
    "train_iters": STEPS,
    "shuffle": False,
    "beta": BETA,
    "lr": LR,
    "lr_decay_style": "constant",
    "adam_beta2": 0.999,
    "adam_eps": EPSILON,
}
NEAR = dict(rel=1e-4, abs=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Qwen2 without a mask token, imported as block size 1, and pairs for five steps."""
    folder = tmp_path_factory.mktemp("trl")
    folders.write_folder(folder / "hf", folders.QWEN2, mask=False, shape=SHAPE)
    import_checkpoint(folder / "hf", folder / "base", ImportOptions(block_size=1, progress=False))
    uneven_pairs(folder / "pairs.jsonl", STEPS * PAIRS)
    return folder


@pytest.fixture(scope="module")
def ours(folder, server) -> dict[str, list[dict]]:
    common = {**SETTINGS, "load": folder / "base", "data_path": folder / "pairs.jsonl"}
    return {name: server.train({**common, "loss_type": [name], "save": folder / name}) for name in LOSSES}


@pytest.fixture(scope="module")
def theirs(folder) -> dict:
    """TRL's trainers after their runs."""
    return {name: trl_run(folder, name) for name in LOSSES}


def trl_run(folder: Path, loss: str):
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen2ForCausalLM
    from trl import DPOConfig, DPOTrainer

    options = DPOConfig(
        output_dir=str(folder / f"trl_{loss}"),
        loss_type=[loss],
        beta=BETA,
        max_steps=STEPS,
        per_device_train_batch_size=PAIRS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta2=0.999,
        adam_epsilon=EPSILON,
        max_length=None,
        train_sampling_strategy="sequential",
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    trainer = DPOTrainer(
        model=Qwen2ForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32),
        args=options,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "hf"),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_rewards_and_log_probabilities_of_every_step_are_trls(ours, theirs, loss):
    logged = [row for row in theirs[loss].state.log_history if "loss" in row]
    assert len(logged) == len(ours[loss]) == STEPS
    names = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"]
    for step, (mine, row) in enumerate(zip(ours[loss], logged, strict=True)):
        # A tie counts half here: before the first update all are ties.
        for name in [*names, "grad_norm"] + ["rewards/accuracies"] * (step > 0):
            assert mine[name] == pytest.approx(row[name], **NEAR), (step, name)
    assert abs(ours[loss][-1]["rewards/margins"]) > 0.01  # it moved


@pytest.mark.parametrize("loss", LOSSES)
def test_the_weights_after_five_steps_are_trls(ours, theirs, folder, loss):
    export_checkpoint(folder / loss, folder / f"back_{loss}", ExportOptions(progress=False))
    expected, start = theirs[loss].model.state_dict(), folders.read_weights(folder / "hf")
    found = folders.read_weights(folder / f"back_{loss}")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert (weight - expected[name]).abs().max() < 1e-4, name
        assert (weight - start[name]).abs().max() > 1e-3, name
    assert json.loads((folder / f"back_{loss}" / "config.json").read_text())["architectures"] == [folders.QWEN2]


def test_sft_learns_the_mean_over_all_response_tokens(folder, server, theirs):
    pairs = read_rows(folder / "pairs.jsonl")[:PAIRS]
    data = write_lines(folder / "sft.jsonl", [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs])
    settings = {key: value for key, value in SETTINGS.items() if key != "beta"}
    run = {**settings, "objective": "sft", "load": folder / "base", "data_path": data, "save": folder / "sft"}
    first, *_, last = server.train(run)
    rows = list(theirs["sigmoid"].train_dataset)[:PAIRS]
    start = theirs["sigmoid"].ref_model.eval()
    likely = sum(log_likelihood(start, row["prompt_ids"], row["chosen_ids"]) for row in rows)
    assert first["loss"] == pytest.approx(-likely / sum(len(row["chosen_ids"]) for row in rows), **NEAR)
    assert last["loss"] < first["loss"] - 0.01


@pytest.fixture(scope="module")
def verb(server, folder):
    return verb_runner(server, folder)


@torch.no_grad()
def log_likelihood(model, prompt: list[int], response: list[int]) -> float:
    whole = torch.tensor(prompt + response)
    log_probs = torch.log_softmax(model(input_ids=whole[None], use_cache=False).logits[0], -1)
    return log_probs[torch.arange(len(prompt) - 1, len(whole) - 1), whole[len(prompt) :]].double().sum().item()


def test_score_prints_trls_rewards(ours, theirs, folder, verb):
    """After the run, of the policy against what it started from."""
    verb("score", checkpoint=folder / "sigmoid", data=folder / "pairs.jsonl", output=folder / "scores.jsonl")
    policy, start = theirs["sigmoid"].model.eval(), theirs["sigmoid"].ref_model.eval()
    for row, pair in zip(read_rows(folder / "scores.jsonl"), theirs["sigmoid"].train_dataset, strict=True):
        for name in ("chosen", "rejected"):
            likely, before = (log_likelihood(m, pair["prompt_ids"], pair[f"{name}_ids"]) for m in (policy, start))
            assert row[f"logps/{name}"] == pytest.approx(likely, **NEAR)
            assert row[f"rewards/{name}"] == pytest.approx(BETA * (likely - before), abs=1e-3)


def test_generate_writes_what_transformers_writes(ours, theirs, folder, verb):
    prompts = read_rows(folder / "pairs.jsonl")[:6]
    files = {"checkpoint": folder / "sigmoid", "prompts": folder / "pairs.jsonl", "output": folder / "answers.jsonl"}
    verb("generate", **files, max_new_tokens=12, batch_size=4)
    model = theirs["sigmoid"].model.eval()
    padding = list(range(259, SHAPE["vocabulary"]))  # rows that are no token are never written here
    how = dict(do_sample=False, eos_token_id=258, pad_token_id=256, suppress_tokens=padding)
    for row in read_rows(folder / "answers.jsonl")[: len(prompts)]:
        ids = torch.tensor([list(row["prompt"].encode())])  # the tokenizer is one of bytes
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **how)
        assert row["completion_ids"] == written[0, ids.shape[1] :].tolist()
        assert row["completion_passes"] == len(row["completion_ids"])


def even(row: dict, text: str) -> bool:
    """A verifier."""
    return len(text) % 2 == 0


def test_pairs_are_recorded_with_their_exact_likelihoods(ours, folder, verb):
    """What was decoded is scored as it was decoded, and trained on."""
    files = {"checkpoint": folder / "sigmoid", "prompts": folder / "pairs.jsonl", "output": folder / "own.jsonl"}
    verb("pairs", **files, samples=8, max_new_tokens=24, verifier=f"{__name__}:even")
    rows = read_rows(folder / "own.jsonl")
    assert all(row["chosen_steps"] == list(range(len(row["chosen_ids"]))) for row in rows)
    printed = verb("score", checkpoint=folder / "sigmoid", data=folder / "own.jsonl")
    (line,) = [line for line in printed.splitlines() if line.startswith("from the decoder's")]
    assert float(line.split()[3]) < 1e-3 and f"of {2 * len(rows)} recorded" in line
