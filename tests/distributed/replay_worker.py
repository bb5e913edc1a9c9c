"""One tensor-parallel process of `test_replay.py`: ``main(INPUT, OUTPUT)``. Decodes, and scores every
decoding through the packed layout."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_dtrpo.config.settings import ModelSettings, ParallelSettings
from megatron_dtrpo.runtime import initialize
from tests.support import oracles


def replayed(model, noising, prompt: list[int], completion) -> list[tuple[int, float]]:
    """(position, log-probability) of everything that the decoding wrote, from one forward pass."""
    from megatron_dtrpo.data.batches import Decoded
    from megatron_dtrpo.data.micro_batch import Sample
    from megatron_dtrpo.model.attention import attention_width, plan_attention

    discarded = torch.tensor([token[:4] for token in completion.discarded], dtype=torch.long).view(-1, 4)
    decoded = Decoded(torch.tensor(completion.steps), discarded)
    document = noising.document(Sample(0, 0), torch.tensor(prompt), [torch.tensor(completion.tokens)], [decoded])
    width = attention_width(model.config)
    attention = plan_attention(document.coordinates(), document.block_size, "sdpa", width=width)
    with torch.no_grad():
        log_probs = model(document.tokens, document.position, attention, document.target_row, document.target_token)
    assert document.target_weight.eq(1).all()
    position = document.position[document.target_row] + noising.shift
    return list(zip(position.tolist(), log_probs.tolist(), strict=True))


def run(job: dict, ranks: int, parallel: ParallelSettings) -> list:
    """Per options and prompt: the completion, and what it replays."""
    from megatron_dtrpo.config.decoding import DecodingOptions
    from megatron_dtrpo.config.estimators import EstimatorOptions
    from megatron_dtrpo.data.batches import Noising
    from megatron_dtrpo.inference.decoder import BlockDecoder, Vocabulary
    from megatron_dtrpo.model.initialization import global_parameter_names
    from megatron_dtrpo.model.provider import build_model

    model = build_model(ModelSettings(**job["model"]), parallel)
    with torch.no_grad():
        for name, parameter in global_parameter_names(model).items():
            parameter.copy_(oracles.split_for_tensor_parallel(name, job["parameters"][name], ranks)[dist.get_rank()])
    vocabulary = Vocabulary(job["vocab_size"], job["mask_id"], frozenset(job["end_ids"]))
    block_size, shift = job["model"]["block_size"], job["shift"]
    decoder = BlockDecoder(model, vocabulary, block_size, max_positions=4096, shift=shift)
    start = "clean" if shift and block_size else None
    noising = Noising("exact_trajectory", EstimatorOptions(), 1, start, block_size, job["mask_id"], seed=0, shift=shift)
    results = []
    for options in job["options"]:
        completions = decoder.decode(job["prompts"], DecodingOptions(**options), batch_size=5, seed=3)
        scores = [replayed(model, noising, *one) for one in zip(job["prompts"], completions, strict=True)]
        results.append(list(zip(completions, scores, strict=True)))
    return results


def main(source: str, target: str) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    parallel = ParallelSettings(tensor_model_parallel_size=ranks)
    initialize.start(parallel, seed=1)
    results = {shift: run(job, ranks, parallel) for shift, job in torch.load(source, weights_only=False).items()}
    if dist.get_rank() == 0:
        torch.save(results, target)
    initialize.stop()
