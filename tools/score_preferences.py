#!/usr/bin/env python3
"""Scores preference pairs under a checkpoint, relative to a reference checkpoint.

    python tools/score_preferences.py --checkpoint RUN --reference BASE --data pairs.jsonl [--output scores.jsonl]

Prints reward accuracy and margin with 95% intervals; a tie counts half. ``likelihood`` rows compare the two responses
under the checkpoint alone. With --estimator exact_trajectory the last line says how far any log-likelihood is from what
the decoder itself recorded: rounding, if the checkpoint is the one that decoded.

What a preference run was trained with (estimator, steps_per_block, beta, seq_length ...) is read from its folder; every
such setting is a flag here too (--num-views 8 for less noise), as `python -m megatron_dtrpo.train --help` lists them.
Runs under torchrun as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from megatron_dtrpo.arguments import parse
from megatron_dtrpo.diffusion.estimators import ESTIMATORS
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.fp8 import refuse_fp8
from megatron_dtrpo.train import run_command


def _score(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="score_preferences.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--checkpoint", required=True, help="Run folder whose policy is scored.")
    parser.add_argument("--reference", help="Run folder of the reference policy; default: likelihoods only.")
    parser.add_argument("--data", required=True, help="Preference pairs, as for training.")
    parser.add_argument("--output", help="JSONL file: one object per pair.")
    arguments, rest = parser.parse_known_args(argv)
    config, given = parse(rest, parser.prog, __doc__)
    refuse_fp8(config.parallel, "scoring")
    config.run.load, config.data.data_path = arguments.checkpoint, arguments.data
    if arguments.output and not Path(arguments.output).resolve().parent.is_dir():
        raise UserError(f"--output {arguments.output}: its folder does not exist")

    from megatron_dtrpo.runtime import initialize

    initialize.enable_device()
    from megatron_dtrpo.training.setup import follow_run, prepare

    follow_run(config, given, arguments.checkpoint)

    with tempfile.TemporaryDirectory() as scratch:
        config.data.data_cache_path = config.data.data_cache_path or scratch
        tokenizer, data_parallel = prepare(config, given, training=False)
        with initialize.process_groups(config.parallel, config.optimizer.seed):
            rows = _rows(config, tokenizer, data_parallel, arguments.reference)
    if initialize.rank() == 0:
        _report(rows, arguments.output)


def _rows(config, tokenizer, data_parallel: int, reference: str | None) -> list[dict]:
    from megatron.core import parallel_state

    from megatron_dtrpo.model.attention import choose_backend
    from megatron_dtrpo.model.provider import build_chunks
    from megatron_dtrpo.runtime import initialize
    from megatron_dtrpo.training import checkpoint
    from megatron_dtrpo.training.scoring import score_pairs
    from megatron_dtrpo.training.setup import open_data

    if reference is not None:
        saved = checkpoint.load_model_config(reference)
        checkpoint.check_same_architecture(config.model, saved, reference)
    data = open_data(config, tokenizer)
    rank = parallel_state.get_data_parallel_rank()
    policy_batches = data.batches(config, rank, data_parallel)
    reference_batches = data.reference_batches(config, rank, data_parallel)
    for line in data.remarks(config) if initialize.rank() == 0 else ():
        print(line, flush=True)
    indices = sorted(sample.index for sample in data.order.take(0, len(data.order)))
    device = initialize.device()
    backend = choose_backend(config.parallel.attention_backend, device)
    model = [chunk.to(device) for chunk in build_chunks(config.model, config.parallel)]

    def scores(folder: str, builder) -> dict:
        checkpoint.load(folder, checkpoint.require_latest(folder), model)
        return score_pairs(model, builder, indices, device, backend)

    policy = scores(config.run.load, policy_batches)
    base = scores(reference, reference_batches) if reference is not None else None
    rows = []
    for index in indices:
        row = {
            "source": data.store.location(index),
            "logps/chosen": policy[index][0],
            "logps/rejected": policy[index][1],
        }
        if base is not None:
            beta = config.objective.beta
            row["rewards/chosen"] = beta * (policy[index][0] - base[index][0])
            row["rewards/rejected"] = beta * (policy[index][1] - base[index][1])
            row["rewards/margins"] = row["rewards/chosen"] - row["rewards/rejected"]
        if ESTIMATORS[config.objective.estimator].every_step:
            row |= _recorded(data.store.row(index))
        rows.append(row)
    return rows


def _recorded(row: dict) -> dict:
    """What the decoder itself believed of the responses, where the data says so."""
    fields = {f"recorded/{name}": row.get(f"{name}_log_likelihood") for name in ("chosen", "rejected")}
    return {name: value for name, value in fields.items() if isinstance(value, float)}


def _report(rows: list[dict], output: str | None) -> None:
    from megatron_dtrpo.training.checkpoint import write_atomically
    from megatron_dtrpo.training.scoring import accuracy, mean

    print(f"pairs                {len(rows)}")
    if "rewards/margins" in rows[0]:
        margins = [row["rewards/margins"] for row in rows]
        print(f"reward accuracy      {accuracy(margins)}")
        print(f"reward margin        {mean(margins)}")
    differences = [row["logps/chosen"] - row["logps/rejected"] for row in rows]
    print(f"likelihood accuracy  {accuracy(differences)}")
    print(f"likelihood margin    {mean(differences)}")
    recorded = [
        abs(row[f"logps/{name}"] - row[f"recorded/{name}"])
        for row in rows
        for name in ("chosen", "rejected")
        if f"recorded/{name}" in row
    ]
    if recorded:
        print(f"from the decoder's   {max(recorded):.2g} at most, of {len(recorded)} recorded log-likelihoods")
    if output:
        write_atomically(Path(output), "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    sys.exit(run_command(_score))
