"""Walks a coming run's steps under its reference policy and writes the scores that `reference_cache` reads."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from megatron_dtrpo.checkpoint.fingerprint import weights_fingerprint
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import initialize
from megatron_dtrpo.training.engine import Engine
from megatron_dtrpo.training.reference_cache import CacheWriter, score_inputs
from megatron_dtrpo.training.scoring import gathered_scores
from megatron_dtrpo.training.setup import open_data


def precompute(config: Config, tokenizer: Tokenizer, data_parallel_size: int, output: Path) -> str:
    """Writes ``output``; collective. Returns what was done, in a line.

    The batches are the run's own, step by step: packed in another way, a sum would be rounded in another way too.
    """
    data, is_main = open_data(config, tokenizer), initialize.rank() == 0
    for line in data.remarks(config) if is_main else ():
        print(line, flush=True)
    batch = config.data.global_batch_size
    steps = config.optimizer.steps(len(data.order), batch)
    if steps == 0:
        raise UserError("num_epochs is 0: there is no step to precompute")
    epochs = -(-steps * batch // len(data.order))
    engine = Engine.of_reference(config, tokenizer)
    builder = data.reference_batches(config, engine.replica, data_parallel_size)
    inputs = score_inputs(config, tokenizer) | {
        "data": data.store.content,
        "weights": weights_fingerprint(engine.chunks),
    }

    writer = CacheWriter(output, inputs, epochs, len(data.store)) if is_main else None
    try:
        show_bar = config.run.progress and is_main and sys.stderr.isatty()
        with engine.as_reference():
            for step in tqdm(range(steps), unit="step", disable=not show_bar):
                scores = gathered_scores(engine, builder.step(step * batch))
                if writer is not None:
                    writer.add(scores)
        if writer is not None:
            writer.finish()
    finally:
        if writer is not None:
            writer.discard()  # leaves a finished cache alone
    return f"scored {steps} steps of {batch} pairs, {epochs} epochs, under the reference: {output}"
