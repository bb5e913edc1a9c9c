"""One tensor- or pipeline-parallel process of `test_decoding.py`: ``main(INPUT, PP, OUTPUT)``."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_dtrpo.config.settings import ModelSettings, ParallelSettings
from megatron_dtrpo.runtime import initialize
from tests.support import oracles


def main(source: str, stages: str, target: str) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1)) // int(stages)
    job = torch.load(source, weights_only=False)
    parallel = ParallelSettings(
        tensor_model_parallel_size=ranks,
        pipeline_model_parallel_size=int(stages),
        sequence_parallel=job.get("sequence_parallel", False),
    )
    initialize.start(parallel, seed=1)
    from megatron.core import parallel_state

    from megatron_dtrpo.config.decoding import DecodingOptions
    from megatron_dtrpo.inference.decoder import BlockDecoder, Vocabulary
    from megatron_dtrpo.model.initialization import global_parameter_names
    from megatron_dtrpo.model.provider import build_model

    model = build_model(ModelSettings(**job["model"]), parallel).double()
    model.config.params_dtype = torch.float64
    rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in global_parameter_names(model).items():
            parameter.copy_(oracles.split_for_tensor_parallel(name, job["parameters"][name], ranks)[rank])
    vocabulary = Vocabulary(job["vocab_size"], job["mask_id"], frozenset([job["end_id"]]))
    decoder = BlockDecoder(model, vocabulary, job["model"]["block_size"], 4096, job.get("attention_backend", "auto"))
    results = []
    for case in job["cases"]:
        options = DecodingOptions(**case["options"])
        results.append(decoder.decode(job["prompts"], options, batch_size=case["batch_size"]))
    if dist.get_rank() == 0:
        torch.save(results, target)
    initialize.stop()
