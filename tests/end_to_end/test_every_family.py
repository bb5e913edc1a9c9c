"""Every command on a checkpoint of every family. A family's numbers are compared in its unit tests; here a user's way
through the commands has to hold: what is imported comes back, and what is decoded and recorded has the likelihood that
the decoder believed."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from megatron_dtrpo.cli import convert, doctor, evaluate, generate, pairs, plan, score, train
from megatron_dtrpo.doctor.machine import gather
from megatron_dtrpo.families.registry import FAMILIES
from tests.end_to_end.test_evaluate import write_task
from tests.support import conversion_folders as folders
from tests.support.launch import flags, read_metrics, write_lines

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]

SHAPE = dict(layers=2, hidden=32, ffn=40, heads=4, groups=2, width=8, vocabulary=272)


@dataclass(frozen=True)
class Case:
    """``block``: as `inspect` says it; ``refusal``: of a run with ``block_start`` noisy, or with vrpo where a block is
    a token; ``flags``: of import; ``adds``: what they add to config.json."""

    architecture: str
    block: str
    shift: int
    refusal: str
    flags: tuple[str, ...] = ()
    adds: dict | None = None

    @property
    def is_autoregressive(self) -> bool:
        return self.block == "1"

    @property
    def refused(self) -> dict:
        return {"estimator": "vrpo"} if self.is_autoregressive else {"block_start": "noisy"}


BIASED = "estimator dtrpo with block_start noisy is biased"
NO_START = "block_start noisy: a model of family"


CASES = {
    "fast_dllm_v2": Case(folders.FAST_DLLM, "8", 1, BIASED),
    "qwen2": Case(folders.QWEN2, "8", 1, BIASED, ("--add-mask-token", "--block-size", "8"), {"bd_size": 8}),
    "sdar": Case(folders.SDAR, "4", 0, NO_START),
    "a2d_qwen3": Case(folders.A2D, "32", 0, NO_START),
    "qwen3": Case(folders.QWEN3, "32", 1, BIASED, ("--add-mask-token",), {"block_size": 32}),
    "llama": Case(folders.LLAMA, "1", 1, "estimator vrpo: with block_size 1", ("--block-size", "1"), {"block_size": 1}),
    "llada": Case(folders.LLADA, "the whole sequence", 0, NO_START),
    "dream": Case(folders.DREAM, "the whole sequence", 1, NO_START),
}


def test_every_family_is_here():
    assert CASES.keys() == FAMILIES.keys()


@pytest.fixture(scope="module")
def machine():
    """Found out once: it takes seconds and is the same for every family."""
    return gather()


@pytest.mark.parametrize("family", CASES)
def test_all_commands(tmp_path, capfd, monkeypatch, machine, family):
    case = CASES[family]
    monkeypatch.setattr(doctor, "gather", lambda: machine)
    mask = not {"qwen2", "qwen3", "llama"} & {family}
    shape = {**SHAPE, "groups": 4 if family == "llada" else 2}
    source = folders.write_folder(tmp_path / "hf", case.architecture, shape=shape, mask=mask)
    weights = folders.read_weights(source)
    weights["model.transformer.ff_out.weight" if family == "llada" else "lm_head.weight"][258] *= 5  # responses end
    folders.write_weights(source, weights)

    def run(module, *words, **settings) -> str:
        """What a command prints; it succeeds."""
        capfd.readouterr()
        status = module.main([*map(str, words), *flags(settings)])
        out, err = capfd.readouterr()
        assert status in (0, None), err
        return out + err

    run(convert, "import", *case.flags, hf_path=source, megatron_path=tmp_path / "base")
    told = run(convert, "inspect", tmp_path / "base")
    attention = "full" if case.block.startswith("the") else "block_causal"
    assert f"{family}, prediction shift {case.shift}, attention {attention}" in told
    assert f"block size    {case.block}\n" in told
    assert family in run(convert, "inspect", source)
    assert " are equal" in run(convert, "roundtrip", hf_path=source)

    rows = [{"prompt": text, "chosen": "Yes, it is.", "rejected": "No."} for text in ("One? ", "Is it so, or not? ")]
    data = write_lines(tmp_path / "pairs.jsonl", rows)
    run_settings = dict(load=tmp_path / "base", data_path=data, seq_length=2048, global_batch_size=2)
    run_settings |= dict(save=tmp_path / "run", train_iters=2, lr=1e-3)
    model = tmp_path / "base" / "model_config.yaml"
    assert "layouts fit" in run(plan, config=model, gpus=4)
    assert "this run works here" in run(doctor, **run_settings)
    run(train, **run_settings)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert 0.69314 < losses[0] < 0.69316 and losses[1] != losses[0]

    capfd.readouterr()
    assert train.main(flags({**run_settings, "save": tmp_path / "wrong", **case.refused})) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {case.refusal}")

    decoding = dict(checkpoint=tmp_path / "run", max_new_tokens=12)
    asked = write_lines(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    page = tmp_path / "trace.html"
    run(generate, "--record-trajectory", **decoding, prompts=asked, output=tmp_path / "out.jsonl", trace=page)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(1 <= len(row["completion_ids"]) <= 12 for row in written) and "One? " in page.read_text()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "halves.py").write_text("def judge(row, text):\n    return sum(map(ord, text)) % 2 == 0\n")
    own = tmp_path / "own.jsonl"
    run(
        pairs,
        **decoding,
        prompts=asked,
        output=own,
        samples=24,
        pairs_per_prompt=3,
        verifier="halves:judge",
    )
    told = run(
        score,
        checkpoint=tmp_path / "run",
        data=own,
        estimator="exact" if case.is_autoregressive else "exact_trajectory",
        seq_length=2048,
    )
    (line,) = (line for line in told.splitlines() if line.startswith("from the decoder's"))
    assert float(line.split()[3]) < 1e-4, line

    (tmp_path / "tasks").mkdir()
    question = {"question": "The sky is", "choices": [" blue", " green"], "label": 0, "answer": "blue"}
    how = dict(doc_to_text="{{question}}", generation_kwargs={"until": ["\n"], "max_gen_toks": 8, "do_sample": False})
    write_task(
        tmp_path, "writes", [question], "exact_match", output_type="generate_until", doc_to_target="{{answer}}", **how
    )
    choice = dict(output_type="multiple_choice", doc_to_choice="{{choices}}", doc_to_target="label")
    write_task(tmp_path, "chooses", [question], "acc", doc_to_text="{{question}}", **choice)
    told = run(evaluate, checkpoint=tmp_path / "run", include_path=tmp_path / "tasks", tasks="writes,chooses")
    assert "exact_match" in told and "acc" in told

    run(convert, "export", megatron_path=tmp_path / "base", hf_path=tmp_path / "same")
    folders.assert_same_weights(source, tmp_path / "same")
    original = json.loads((source / "config.json").read_text())
    added = {"vocab_size": original["vocab_size"]} if not mask else {}
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == original | (case.adds or {}) | added
    run(convert, "export", megatron_path=tmp_path / "run", hf_path=tmp_path / "trained")
    assert run(generate, checkpoint=tmp_path / "trained", prompt="One? ", max_new_tokens=4)
