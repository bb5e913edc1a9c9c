"""Runs that train adapters are PEFT's on transformers' Qwen2, under every layout; and what becomes of their adapters:
checkpoints, exports, imports, and the other verbs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dtrpo.checkpoint.adapter import AdapterRecord, base_and_adapter
from megatron_dtrpo.cli import convert
from megatron_dtrpo.conversion.inspection import inspect
from megatron_dtrpo.conversion.peft import WEIGHTS, import_peft
from megatron_dtrpo.conversion.to_huggingface import ExportOptions, export_checkpoint
from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
from megatron_dtrpo.errors import UserError
from tests.support import conversion_folders as folders
from tests.support.launch import read_rows, uneven_pairs, verb_runner

pytest.importorskip("peft")
pytestmark = pytest.mark.distributed

SHAPE = dict(layers=2, hidden=32, ffn=48, heads=4, groups=2, width=8, vocabulary=384)
STEPS, PAIRS, LR, BETA, EPSILON, END = 3, 4, 1e-3, 0.1, 1e-5, 258
RANK, ALPHA = 4, 6.0
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "seq_length": 2048,
    "micro_batch_size": 3,
    "global_batch_size": PAIRS,
    "train_iters": STEPS,
    "shuffle": False,
    "beta": BETA,
    "lr": LR,
    "lr_decay_style": "constant",
    "adam_beta2": 0.999,
    "adam_eps": EPSILON,
    "clip_grad": 0.0,
}
TP2, SP = {"tensor_model_parallel_size": 2}, {"sequence_parallel": True}
PP2, CP2 = {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}
OVERLAPPED = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
RECOMPUTED = {"recompute_granularity": "full"}
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "tp2_sp": (2, {**TP2, **SP, "recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
    "pp2": (2, {**PP2, **RECOMPUTED}),
    "cp2": (2, CP2),
    "dp2": (2, OVERLAPPED),
}


def peft_model(folder: Path, adapter: Path | None = None):
    """transformers' model with adapters, random ones or those of a folder, in float64."""
    import peft
    from transformers import Qwen2ForCausalLM

    base = Qwen2ForCausalLM.from_pretrained(folder / "hf", dtype=torch.float64)
    if adapter is not None:
        return peft.PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False, is_trainable=True).double()
    options = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, options).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Qwen2 imported as block size 1, an adapter that PEFT saved and its import, and pairs for three steps."""
    folder = tmp_path_factory.mktemp("lora")
    folders.write_folder(folder / "hf", folders.QWEN2, mask=False, shape=SHAPE)
    import_checkpoint(folder / "hf", folder / "base", ImportOptions(block_size=1, progress=False))
    peft_model(folder).float().save_pretrained(folder / "peft")
    assert import_peft(folder / "peft", folder / "adapter", folder / "base") == []
    uneven_pairs(folder / "pairs.jsonl", STEPS * PAIRS)
    return folder


def likelihood(model, prompt: str, response: str) -> torch.Tensor:
    ids = list(prompt.encode()), [*response.encode(), END]
    whole = torch.tensor([*ids[0], *ids[1]])
    log_probs = torch.log_softmax(model(input_ids=whole[None], use_cache=False).logits[0], -1)
    places = torch.arange(len(ids[0]), len(whole))
    return log_probs[places - 1, whole[places]].sum()


@pytest.fixture(scope="module")
def theirs(folder) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, norms of the gradient, and adapters after three steps of DPO, written out."""
    import peft

    model = peft_model(folder, folder / "peft").eval()
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=LR, betas=(0.9, 0.999), eps=EPSILON, weight_decay=0.0)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    losses, norms = [], []
    for step in range(STEPS):
        total = 0.0
        for row in rows[step * PAIRS :][:PAIRS]:
            with torch.no_grad(), model.disable_adapter():
                before = [likelihood(model, row["prompt"], row[key]) for key in ("chosen", "rejected")]
            after = [likelihood(model, row["prompt"], row[key]) for key in ("chosen", "rejected")]
            margin = (after[0] - before[0]) - (after[1] - before[1])
            total = total - torch.nn.functional.logsigmoid(BETA * margin) / PAIRS
        optimizer.zero_grad()
        total.backward()
        losses.append(total.item())
        norms.append(torch.stack([p.grad.norm() for p in adapters]).norm().item())
        optimizer.step()
    return losses, norms, peft.get_peft_model_state_dict(model)


@pytest.fixture(scope="module")
def ours(folder, server):
    """Name of a layout -> the metrics of its run, which trains once."""
    done: dict[str, list[dict]] = {}

    def run(name: str) -> list[dict]:
        if name not in done:
            processes, settings = LAYOUTS[name]
            files = {"load": folder / "base", "load_adapter": folder / "adapter", "data_path": folder / "pairs.jsonl"}
            done[name] = server.train({**SETTINGS, **settings, **files, "save": folder / name}, processes)
        return done[name]

    return run


def exported(folder: Path, run: str) -> dict[str, torch.Tensor]:
    target = folder / f"{run}_peft"
    if not target.exists():
        export_checkpoint(folder / run, target, ExportOptions(peft=True))
    return load_file(target / WEIGHTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps_are_pefts_under_every_layout(folder, ours, theirs, layout):
    losses, norms, adapters = theirs
    rows = ours(layout)
    for row, loss, norm in zip(rows, losses, norms, strict=True):
        assert row["loss"] == pytest.approx(loss, abs=1e-4)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    found = exported(folder, layout)
    assert found.keys() == adapters.keys()
    for name, weight in found.items():
        assert (weight - adapters[name]).abs().max() < 1e-4, name
    note = f"note: the reference is {folder / 'base'} without the adapter {folder / 'adapter'}: "
    assert note in (folder / f"{layout}.log").read_text()
    records = [AdapterRecord.read(folder / name) for name in (layout, "adapter")]
    assert records[0].base_fingerprint == records[1].base_fingerprint


@pytest.fixture(scope="module")
def verb(server, folder):
    return verb_runner(server, folder)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return model(input_ids=torch.randint(0, 259, (2, 23), generator=generator), use_cache=False).logits


def test_an_export_is_ours_in_peft_and_merged(folder, ours, verb):
    """``score`` says what ours computes; PEFT loads the adapter, transformers the merged weights."""
    from transformers import Qwen2ForCausalLM

    ours("one")
    exported(folder, "one")
    export_checkpoint(folder / "one", folder / "merged", ExportOptions(progress=False))
    files = {"data": folder / "pairs.jsonl", "output": folder / "scores.jsonl", "beta": BETA}
    verb("score", checkpoint=folder / "one", **files)
    model = peft_model(folder, folder / "one_peft").eval()
    before = peft_model(folder).eval()
    for row, pair in zip(read_rows(folder / "scores.jsonl"), read_rows(folder / "pairs.jsonl"), strict=True):
        for key in ("chosen", "rejected"):
            with torch.no_grad(), before.disable_adapter():
                likely, start = (likelihood(m, pair["prompt"], pair[key]).item() for m in (model, before))
            assert row[f"logps/{key}"] == pytest.approx(likely, rel=1e-5, abs=1e-5)
            assert row[f"rewards/{key}"] == pytest.approx(BETA * (likely - start), abs=1e-4)
    merged = Qwen2ForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    assert (logits(merged) - logits(model.float())).abs().max() < 1e-5
    # Back again: the merged weights here, without an adapter, and the adapter through PEFT.
    import_checkpoint(folder / "merged", folder / "merged_base", ImportOptions(block_size=1, progress=False))
    import_peft(folder / "one_peft", folder / "one_back", folder / "base")
    scores = read_rows(folder / "scores.jsonl")
    verb("score", checkpoint=folder / "base", load_adapter=folder / "one_back", **files)
    for row, other in zip(read_rows(folder / "scores.jsonl"), scores, strict=True):
        assert row["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=1e-6)
        assert row["rewards/chosen"] == pytest.approx(other["rewards/chosen"], abs=1e-5)  # against the bare weights
    verb("score", checkpoint=folder / "merged_base", **files)
    for row, other in zip(read_rows(folder / "scores.jsonl"), scores, strict=True):
        assert row["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=1e-6)


def test_a_merged_weight_is_the_fp32_sum_in_the_weights_dtype(folder):
    """Not a sum in bf16, and bit for bit the weight where there is no adapter."""
    theirs = {name: weight.bfloat16() for name, weight in folders.read_weights(folder / "hf").items()}
    folders.write_folder(folder / "hf16", folders.QWEN2, mask=False, shape=SHAPE, dtype=torch.bfloat16)
    assert all(torch.equal(weight, theirs[name]) for name, weight in folders.read_weights(folder / "hf16").items())
    import_checkpoint(folder / "hf16", folder / "base16", ImportOptions(block_size=1, progress=False))
    import_peft(folder / "peft", folder / "adapter16", folder / "base16")
    options = ExportOptions(adapter=folder / "adapter16", progress=False, max_shard_bytes=20_000)
    export_checkpoint(folder / "base16", folder / "merged16", options)
    adapter = {n.removeprefix("base_model.model."): w for n, w in load_file(folder / "peft" / WEIGHTS).items()}
    merged = folders.read_weights(folder / "merged16")
    assert merged.keys() == theirs.keys()
    for name, weight in theirs.items():
        A, B = (adapter.get(name.removesuffix("weight") + f"lora_{letter}.weight") for letter in "AB")
        expected = weight if A is None else (weight.float() + ALPHA / RANK * B @ A).bfloat16()
        assert torch.equal(merged[name], expected) or (merged[name].float() - expected.float()).abs().max() < 1e-2
        assert merged[name].dtype == torch.bfloat16
        same = (merged[name] == expected).float().mean()
        assert same == 1 if A is None else same > 0.99, name  # a product in another order rounds a few otherwise


def test_decoding_verbs_take_an_adapter(folder, ours, verb):
    """Beside the weights' folder, as transformers with PEFT decodes; and of its own folder."""
    ours("one")
    exported(folder, "one")
    prompts = [row["prompt"] for row in read_rows(folder / "pairs.jsonl")]
    model = peft_model(folder, folder / "one_peft").float().eval()
    padding = list(range(259, SHAPE["vocabulary"]))  # rows that are no token are never written here
    how = dict(do_sample=False, eos_token_id=END, pad_token_id=256, suppress_tokens=padding)
    files = {"prompts": folder / "pairs.jsonl", "output": folder / "answers.jsonl", "max_new_tokens": 8}
    verb("generate", checkpoint=folder / "base", load_adapter=folder / "one", **files)
    answers = [row["completion_ids"] for row in read_rows(folder / "answers.jsonl")]
    for prompt, written in list(zip(prompts, answers, strict=True))[:4]:
        ids = torch.tensor([list(prompt.encode())])
        expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **how)
        assert written == expected[0, ids.shape[1] :].tolist()
    assert "an adapter (LoRA)" in inspect(folder / "one")["kind"]
    own = {"output": folder / "own.jsonl", "samples": 6, "max_new_tokens": 60}  # some of them end
    verb("pairs", checkpoint=folder / "one", prompts=files["prompts"], verifier=f"{__name__}:even", **own)
    printed = verb("score", checkpoint=folder / "one", data=folder / "own.jsonl")
    (line,) = [line for line in printed.splitlines() if line.startswith("from the decoder's")]
    assert float(line.split()[3]) < 1e-3


def even(row: dict, text: str) -> bool:
    """A verifier."""
    return len(text) % 2 == 0


def refused(server, folder: Path, **settings) -> str:
    """The one line of a run that must not start."""
    save = folder / "refused"
    shared = {**SETTINGS, "data_path": folder / "pairs.jsonl", "save": save, "load": folder / "base"}
    statuses, output = server.run({**shared, **settings}, folder / "refused.log")
    assert statuses == [2] and not list(save.glob("iter_*")), output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    (folder / "refused.log").unlink()
    return line


def test_what_cannot_be_is_refused_in_a_line(folder, server, ours):
    ours("one")
    line = refused(server, folder, load=folder / "one")
    assert line.endswith(
        f"holds an adapter and no other weights: give --load {folder / 'base'} --load-adapter {folder / 'one'}"
    )
    other = folder / "other"
    folders.write_folder(folder / "hf_other", folders.QWEN2, mask=False, shape=SHAPE, seed=1)
    import_checkpoint(folder / "hf_other", other, ImportOptions(block_size=1, progress=False))
    line = refused(server, folder, load=other, load_adapter=folder / "one")
    assert line.startswith(f"error: {folder / 'one'}: an adapter of other weights than those in {other}: ")
    for adapter in ("one", "adapter"):
        with pytest.raises(UserError, match="an adapter of other weights than those in"):
            export_checkpoint(other, folder / "no", ExportOptions(adapter=folder / adapter))
    assert not (folder / "no").exists()
    line = refused(server, folder, load_adapter=folder / "adapter", lora_rank=7)
    assert line == f"error: {folder / 'adapter'}: an adapter of lora_rank {RANK}, not 7: leave it out"
    with pytest.raises(
        UserError, match="a PEFT folder: turn it into one with megatron-dtrpo convert import --base BASE"
    ):
        AdapterRecord.read(folder / "peft")
    with pytest.raises(UserError, match=f"give {folder / 'base'} in its place"):
        base_and_adapter(folder / "one", folder / "adapter")
    with pytest.raises(UserError, match="adapter_config.json is missing; for a model's own folder leave --base out"):
        import_peft(folder / "hf_other", folder / "no", folder / "base")
    with pytest.raises(UserError, match="turn the Hugging Face folder into one with megatron-dtrpo convert import"):
        import_peft(folder / "peft", folder / "no", folder / "hf_other")
    assert inspect(folder / "peft")["kind"].startswith("PEFT adapter, LORA")
    line = refused(server, folder, lora_rank=2, reference=folder / "one")
    assert "holds an adapter and no other weights: merge it into its weights first" in line
    # Going on with another adapter is another run.
    shared = {**SETTINGS, "data_path": folder / "pairs.jsonl", "save": folder / "one", "load": folder / "base"}
    statuses, output = server.run({**shared, "lora_rank": RANK, "lora_alpha": 3.0}, folder / "again.log")
    assert statuses == [2] and "this run has lora_alpha 6.0, not 3.0" in output, output


def test_merging_an_adapter_that_fp8_trained_is_refused(folder, tmp_path):
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    record = AdapterRecord.read(tmp_path / "adapter")
    record.fp8_format = "hybrid"
    record.write(tmp_path / "adapter")
    with pytest.raises(UserError, match="trained under FP8 .*: export it alone, with --peft"):
        export_checkpoint(folder / "base", tmp_path / "no", ExportOptions(adapter=tmp_path / "adapter"))
    assert not (tmp_path / "no").exists()
    export_checkpoint(folder / "base", tmp_path / "yes", ExportOptions(adapter=tmp_path / "adapter", peft=True))


def test_an_adapter_of_query_and_value_alone_has_a_zero_key(folder, tmp_path, capsys):
    """PEFT's default for many models; the zero part stays zero, as its gradient is."""
    import peft

    model = peft_model(folder)
    partly = {
        n: w for n, w in peft.get_peft_model_state_dict(model).items() if ".q_proj." in n or "layers.1.self_attn.v" in n
    }
    save_file({name: weight.float() for name, weight in partly.items()}, tmp_path / WEIGHTS)
    config = json.loads((folder / "peft" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    words = ["import", "--hf-path", tmp_path, "--megatron-path", tmp_path / "ours", "--base", folder / "base"]
    assert convert.main(list(map(str, words))) == 0
    assert "k_proj, v_proj have no adapter there: theirs are zero" in capsys.readouterr().err
    assert AdapterRecord.read(tmp_path / "ours").lora_target_modules == ["linear_qkv"]
    export_checkpoint(folder / "base", tmp_path / "back", ExportOptions(adapter=tmp_path / "ours", peft=True))
    for name, weight in load_file(tmp_path / "back" / WEIGHTS).items():
        assert torch.equal(weight, partly[name].float() if name in partly else torch.zeros_like(weight)), name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "use_dora is True, which adapters here do not have"),
        ({"bias": "all"}, "bias is 'all', which"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is"),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens is \\[3, 4\\], which adapters here do not have"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"r": 0}, "r is 0: it must be a positive number"),
        ({"r": 5}, "has shape"),
    ],
)
def test_foreign_adapters_that_would_compute_otherwise_are_refused(folder, tmp_path, change, message):
    shutil.copytree(folder / "peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        import_peft(tmp_path / "peft", tmp_path / "no", folder / "base")
    assert not (tmp_path / "no").exists()
