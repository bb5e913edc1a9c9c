"""One tensor-parallel rank of `test_model.py`: ``main(INPUT, OUTPUT)`` in the fork server.

INPUT holds cases, each with unsharded parameters and a packed sequence. For every case this builds the package's
model, gives it its part of the parameters, and writes to OUTPUT what it computes, unsharded again.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_dtrpo.config.settings import ModelSettings, ParallelSettings
from megatron_dtrpo.runtime import initialize
from tests.support import oracles


def gather(name: str, part: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return oracles.join_tensor_parallel(name, parts)


def run_case(case: dict, ranks: int) -> dict:
    from megatron_dtrpo.model import gpt
    from megatron_dtrpo.model.attention import attention_width, plan_attention
    from megatron_dtrpo.model.initialization import global_parameter_names, initialize_weights
    from megatron_dtrpo.model.provider import build_model

    settings = ModelSettings(**case["model"])
    parallel = ParallelSettings(tensor_model_parallel_size=ranks, **case["parallel"])
    parallel.sequence_parallel &= ranks > 1  # as `config.validate` does
    gpt.LOGIT_ROWS = case["logit_rows"]
    model = build_model(settings, parallel)
    if case["wide"]:
        model.double()
        model.config.params_dtype = torch.float64
    out = {}

    initialize_weights(model, case["seed"])
    out["initial"] = {name: gather(name, p.detach().clone()) for name, p in global_parameter_names(model).items()}

    with torch.no_grad():
        parameters = global_parameter_names(model)
        assert set(parameters) == set(case["parameters"]), set(parameters) ^ set(case["parameters"])
        for name, full in case["parameters"].items():
            part = oracles.split_for_tensor_parallel(name, full, ranks)[dist.get_rank()]
            assert part.shape == parameters[name].shape, (name, part.shape, parameters[name].shape)
            parameters[name].copy_(part)

    model.train()
    sequence = case["sequence"]
    width = attention_width(model.config)
    attention = plan_attention(sequence.coordinates(), sequence.block_size, "sdpa", width=width)
    log_probs = model(sequence.tokens, sequence.position, attention, sequence.target_row, sequence.target_token)
    (log_probs * sequence.target_weight.float()).sum().backward()
    gradients = {}
    for name, parameter in global_parameter_names(model).items():
        gradient = parameter.grad
        # Each rank saw a part of the sequence, or normed the queries and keys of its own heads.
        if getattr(parameter, "sequence_parallel", False) or name.endswith(
            ("q_layernorm.weight", "k_layernorm.weight")
        ):
            dist.all_reduce(gradient)
        gradients[name] = gather(name, gradient)
    out["gradients"] = gradients
    everyone = [torch.empty_like(log_probs) for _ in range(ranks)]
    dist.all_gather(everyone, log_probs.detach())
    assert all(torch.equal(each, everyone[0]) for each in everyone)
    out["log_probs"] = everyone[0]
    with torch.no_grad():
        hidden = model(sequence.tokens, sequence.position, attention)
    out["hidden"] = hidden
    return out


def sharp_gradients(rank: int, ranks: int) -> dict[float, torch.Tensor]:
    """Gradients of the logits of `oracles.sharp_logits` in bf16, each rank's part computed by itself."""
    from megatron_dtrpo.objectives.logprobs import vocab_parallel_log_probs

    found = {}
    for probability in oracles.SHARP:
        logits, target, _ = oracles.sharp_logits(probability, torch.bfloat16)
        part = logits.chunk(ranks, dim=1)[rank].contiguous().requires_grad_()
        vocab_parallel_log_probs(part, target, group=dist.group.WORLD).sum().backward()
        parts = [torch.empty(part.shape) for _ in range(ranks)]
        dist.all_gather(parts, part.grad.float())
        found[probability] = torch.cat(parts, 1)
    return found


def padded_log_probs(rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and gradient of `oracles.padded_logits`, each rank's part by itself."""
    from megatron_dtrpo.objectives.logprobs import vocab_parallel_log_probs

    logits, target = oracles.padded_logits()
    part = logits.chunk(ranks, dim=1)[rank].contiguous().requires_grad_()
    tokens = min(max(oracles.FEW - rank * part.shape[1], 0), part.shape[1])
    log_probs = vocab_parallel_log_probs(part, target, tokens, dist.group.WORLD)
    log_probs.sum().backward()
    parts = [torch.empty_like(part) for _ in range(ranks)]
    dist.all_gather(parts, part.grad)
    return log_probs.detach(), torch.cat(parts, 1)


def main(source: str, target: str) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    initialize.start(ParallelSettings(tensor_model_parallel_size=ranks), seed=1)
    cases = torch.load(source, weights_only=False)
    results = {name: run_case(case, ranks) for name, case in cases.items()}
    results["padded"] = padded_log_probs(dist.get_rank(), ranks)
    results["sharp gradients"] = sharp_gradients(dist.get_rank(), ranks)
    if dist.get_rank() == 0:
        torch.save(results, target)
    initialize.stop()
