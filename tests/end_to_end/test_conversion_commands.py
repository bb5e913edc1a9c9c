"""The commands of the README and of convert, run as a user runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import train_tokenizer
from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.data.tokenizer import load_tokenizer
from tests.support import conversion_folders as folders
from tests.support import launch, oracles

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]

CONFIG = "examples/dtrpo_7b.yaml"
PROGRAMS = {
    "megatron-dtrpo": [sys.executable, "-m", "megatron_dtrpo"],
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
}


def start(words: list[str], cwd: Path, log: Path) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(launch.REPOSITORY), "HF_HUB_OFFLINE": "1"}
    program, *rest = words
    tools = [str(launch.REPOSITORY / word) if word.startswith("tools/") else word for word in rest]
    with log.open("ab") as output:
        return subprocess.Popen(
            [*PROGRAMS[program], *tools],
            cwd=cwd,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_heed_interrupts,
        )


def _heed_interrupts() -> None:
    """A shell starts what it runs in the background deaf to SIGINT, and so would be everything started from there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(words: list[str], cwd: Path) -> tuple[int, str]:
    log = cwd / "log"
    log.unlink(missing_ok=True)
    process = start(words, cwd, log)
    try:
        status = process.wait(timeout=240)
    finally:
        process.kill()
    return status, log.read_text()


def readme_commands() -> list[str]:
    """The three commands under "Import, train, export", on two processes instead of eight."""
    section = (launch.REPOSITORY / "README.md").read_text().split("## Import, train, export")[1]
    block = section.split("```bash\n")[1].split("```")[0].replace("\\\n", "")
    assert CONFIG in block and "--nproc-per-node 8" in block
    return block.replace("--nproc-per-node 8", "--nproc-per-node 2").splitlines()


def write_small_config(folder: Path) -> None:
    """The file that the README's train command names, with the layout and recipe as they are and a small model."""
    values = yaml.safe_load((launch.REPOSITORY / CONFIG).read_text())
    architecture = {name for name in values if name in ModelSettings.__dataclass_fields__}
    assert {"num_layers", "hidden_size", "vocab_size", "block_size"} <= architecture
    small = {name: value for name, value in values.items() if name not in architecture} | {"global_batch_size": 8}
    (folder / CONFIG).parent.mkdir()
    (folder / CONFIG).write_text(yaml.safe_dump(small))


def test_the_readme_imports_trains_and_exports(tmp_path):
    source = folders.write_folder(tmp_path / "Fast_dLLM_v2_7B", dtype=torch.bfloat16, shards=2)
    for name in ("configuration.py", "modeling.py"):
        (source / name).write_text("raise RuntimeError('code of a checkpoint was run')\n")
    launch.uneven_pairs(tmp_path / "pairs.jsonl", 32)
    write_small_config(tmp_path)
    for command in readme_commands():
        status, output = run(command.split(), tmp_path)
        assert status == 0, output
    before, after = folders.checksums(source), folders.checksums(tmp_path / "aligned")
    for name in before:
        if "model" not in name or name.endswith(".py"):
            assert after[name] == before[name], name
    old, new = folders.read_weights(source), folders.read_weights(tmp_path / "aligned")
    assert {n: (w.dtype, w.shape) for n, w in new.items()} == {n: (w.dtype, w.shape) for n, w in old.items()}
    # In bf16 a step of 5e-7 is lost on most weights, but not on all: near zero they are fine enough.
    assert any(not torch.equal(new[name], old[name]) for name in old)


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "ByteLevelTokenizer"])
def test_a_run_from_nothing_is_exported(tmp_path, kind):
    """transformers reads and computes what the run does; imported again it is the same model with the same ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sums = [{"prompt": f"{a} plus {b} is", "completion": f" {a + b}."} for a in range(10) for b in range(10)]
    settings = {
        **launch.TINY_MODEL,
        "objective": "sft",
        "train_iters": 2,
        "lr": 0.01,
        "lr_warmup_iters": 0,
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "save": tmp_path / "run",
        "tokenizer_type": kind,
        "data_path": launch.write_lines(tmp_path / "sums.jsonl", sums),
    }
    if kind == "HuggingFaceTokenizer":
        tokenizer = train_tokenizer.train([text for row in sums for text in row.values()], 285)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        settings["tokenizer_model"] = tmp_path / "tokenizer"
    launch.train(settings)
    tool = ["megatron-dtrpo", "convert"]
    status, output = run([*tool, "export", "--megatron-path", "run", "--hf-path", "hf"], tmp_path)
    assert status == 0 and "note:" not in output, output

    folders.assert_same_model(tmp_path / "run", tmp_path / "hf", iteration=2, padding_is_zero=False)
    ours = load_tokenizer(tmp_path / "run" / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (ours.eos_id, ours.mask_id)
    ids = tokenizer("7 plus 8 is 15.\n  Na\u00efve </s>\u4e2d")["input_ids"]
    assert ids == ours.encode("7 plus 8 is 15.\n  Na\u00efve </s>\u4e2d")
    tokens = torch.tensor(ids[:16])
    case = {"folder": str(tmp_path / "run"), "tokens": tokens, "block_size": launch.TINY_MODEL["block_size"]}
    torch.save({**case, "greedy": 0}, tmp_path / "case.pt")
    worker = launch.REPOSITORY / "tests" / "distributed" / "conversion_worker.py"
    command = [str(worker), str(tmp_path / "case.pt"), str(tmp_path / "result.pt")]
    result = launch.Job({}, tmp_path / "worker.log", command=command).wait(timeout=240)
    assert result.status == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    with torch.no_grad():
        sees = oracles.block_causal(16, case["block_size"])
        logits = oracles.qwen2_logits(model, tokens, torch.arange(16), sees)
    torch.testing.assert_close(torch.load(tmp_path / "result.pt")["logits"], logits, rtol=1e-4, atol=1e-5)

    status, output = run([*tool, "import", "--hf-path", "hf", "--megatron-path", "again"], tmp_path)
    assert status == 0 and "note:" not in output, output
    folders.assert_same_model(tmp_path / "again", tmp_path / "hf")
    again = load_tokenizer(tmp_path / "again" / "tokenizer")
    assert (again.tokenizer_type, again.encode("5 plus 5 [MASK]")) == (
        "HuggingFaceTokenizer",
        ours.encode("5 plus 5 [MASK]"),
    )


def test_roundtrip_and_inspect(tmp_path):
    folders.write_folder(tmp_path / "hf", tied=True)
    status, output = run(["python", "tools/convert_checkpoint.py", "roundtrip", "--hf-path", "hf"], tmp_path)
    assert status == 0 and "all 51 are equal" in output, output
    words = ["python", "tools/convert_checkpoint.py", "roundtrip", "--hf-path", "hf", "--params-dtype", "bf16"]
    status, output = run(words, tmp_path)
    assert status == 2 and "largest difference" in output and "error: 50 of 51 differ" in output, output
    status, output = run(["python", "tools/convert_checkpoint.py", "inspect", "hf"], tmp_path)
    assert status == 0 and "Fast_dLLM_QwenForCausalLM" in output and "|<MASK>| (259)" in output, output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_run_again(tmp_path, number):
    """Large enough to be caught in the act."""
    shape = {"hidden": 1024, "ffn": 16384, "heads": 16, "width": 64, "layers": 4}
    source = folders.write_folder(tmp_path / "hf", shape=shape)
    words = ["megatron-dtrpo", "convert", "import", "--hf-path", "hf", "--megatron-path", "out"]
    process = start(words, tmp_path, tmp_path / "log")
    data = tmp_path / "out.partial" / "iter_0000000" / "__0_0.distcp"
    deadline = time.monotonic() + 120
    while not (data.exists() and data.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)
    assert process.wait(timeout=60) != 0, (tmp_path / "log").read_text()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists() == (number == signal.SIGKILL)
    status, output = run(words, tmp_path)
    assert status == 0, output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "log", "out"]
    status, output = run([*words[:2], "export", "--megatron-path", "out", "--hf-path", "back"], tmp_path)
    assert status == 0, output
    folders.assert_same_weights(source, tmp_path / "back")


def test_a_disk_that_is_full(tmp_path):
    """A real file system of 2 MB; needs the right to mount one."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        folders.write_folder(tmp_path / "hf", shape={"hidden": 560, "width": 20})
        words = ["python", "tools/convert_checkpoint.py", "import", "--hf-path", "hf", "--megatron-path", "small/out"]
        status, output = run(words, tmp_path)
        assert status == 2 and output.startswith("error: the disk of small is too full"), output
        assert not list(small.iterdir())
        blind = "from megatron_dtrpo.conversion import to_megatron; to_megatron.require_space = lambda *a: None; "
        blind += "from tools.convert_checkpoint import main; import sys; sys.exit(main())"
        status, output = run(["python", "-c", blind, *words[2:]], tmp_path)
        assert status == 2 and output.splitlines() == ["error: the disk is full: nothing of small/out was kept"], output
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", small], check=True)


def test_the_measuring_script_on_a_small_model(tmp_path):
    reference = folders.write_folder(tmp_path / "reference", shards=3)
    for file in reference.glob("*.safetensors"):
        file.unlink()
    words = ["python", "-m", "tools.benchmarks.full_size_roundtrip", "--reference", "reference", "--work", "work"]
    status, output = run(words, tmp_path)
    assert status == 0 and "every tensor is equal" in output and "peak RssAnon" in output, output
    assert not (tmp_path / "work").exists()
