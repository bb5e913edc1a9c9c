"""Decoding: the same tokens on the GPU as on the CPU in fp32, and tokens per second in bf16."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import torch
from gpu_checks.common import Result, Size, has_gpu, run_python, verdict

VOCABULARY = 2048


def compare(size: Size, folder: Path) -> Result:
    """Random weights: no response ends early, so that all have the same length."""
    here = decode(size, max(size.batches), bf16=False)
    speeds = {}
    for batch in size.batches:
        decode(size, batch, bf16=has_gpu(), count=max(batch, 4))
        started = time.perf_counter()
        tokens = decode(size, batch, bf16=has_gpu(), count=max(batch, 4))
        speeds[batch] = sum(map(len, tokens)) / (time.perf_counter() - started)
    told = ", ".join(f"batch {batch}: {speed:.0f} tokens/s" for batch, speed in speeds.items())
    if not has_gpu():
        alone = decode(size, 1, bf16=False)
        return verdict(alone == here, f"batch 1 writes what batch {max(size.batches)} does; {told}", speeds=speeds)
    target = folder / "cpu.json"
    run_python(["tools/gpu_check.py", "--decode-to", str(target), "--size", _name(size)], folder / "log", on_cpu=True)
    there = json.loads(target.read_text())
    same = sum(a == b for a, b in zip(here, there, strict=True))
    return verdict(same == len(here), f"{same} of {len(here)} responses are the CPU's; {told} (bf16)", speeds=speeds)


def decode_to(size: Size, target: Path) -> None:
    """Writes what this machine decodes in fp32."""
    target.write_text(json.dumps(decode(size, max(size.batches), bf16=False)))


_decoders: dict = {}


def decode(size: Size, batch: int, bf16: bool, count: int = 16) -> list[list[int]]:
    """The responses to ``count`` random prompts."""
    from megatron_dtrpo.config.decoding import DecodingOptions

    if bf16 not in _decoders:
        _decoders[bf16] = _decoder(size, bf16)
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCABULARY - 1) for _ in range(rng.randint(8, 100))] for _ in range(count)]
    options = DecodingOptions(max_new_tokens=size.new_tokens, small_block_size=8)
    return [completion.tokens for completion in _decoders[bf16].decode(prompts, options, batch_size=batch)]


def _decoder(size: Size, bf16: bool):
    from megatron_dtrpo.config.rules import validate
    from megatron_dtrpo.config.settings import Config, DataSettings, ModelSettings, ParallelSettings
    from megatron_dtrpo.runtime import initialize

    initialize.enable_device()
    parallel = ParallelSettings(bf16=bf16, transformer_impl="local", apply_rope_fusion=False)
    config = Config(model=ModelSettings(vocab_size=VOCABULARY, **size.model), parallel=parallel, data=DataSettings())
    validate(config, 1)
    if not torch.distributed.is_initialized():
        initialize.start(parallel, seed=0)
    from megatron_dtrpo.inference.decoder import BlockDecoder, Vocabulary
    from megatron_dtrpo.model.initialization import initialize_weights
    from megatron_dtrpo.model.provider import build_model

    model = build_model(config.model, parallel).to(initialize.device())
    initialize_weights(model, 1)
    end = frozenset([VOCABULARY])  # a token that no logit stands for
    return BlockDecoder(model, Vocabulary(VOCABULARY, VOCABULARY - 1, end), config.model.block_size, 4096)


def _name(size: Size) -> str:
    from gpu_checks.common import SIZES

    return next(name for name, known in SIZES.items() if known == size)
