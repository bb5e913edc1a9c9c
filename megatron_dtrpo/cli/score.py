"""Scores preference pairs under a checkpoint, relative to a reference checkpoint.

Prints reward accuracy and margin with 95% intervals; a tie counts half. ``likelihood`` rows compare the two responses
under the checkpoint alone. With --estimator exact_trajectory, or block size 1, the last line says how far any
log-likelihood is from what the decoder itself recorded: rounding, if the checkpoint is the one that decoded.

What a preference run was trained with (reference, estimator, steps_per_block, beta, seq_length ...) is read from its
folder; every such setting is a flag here too (--num-views 8 for less noise). Without a reference there are no rewards.
Runs under torchrun as well.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.cli.settings import parse_settings
from megatron_dtrpo.config.command_line import Parser
from megatron_dtrpo.config.estimators import ESTIMATORS
from megatron_dtrpo.config.fp8 import refuse_fp8
from megatron_dtrpo.config.parser import settings_parser
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime.environment import rank

EXAMPLES = """
  megatron-dtrpo score --checkpoint RUN --reference BASE --data pairs.jsonl --output scores.jsonl
"""


def build_parser() -> Parser:
    parser = settings_parser("megatron-dtrpo score", __doc__, EXAMPLES)
    parser.add_argument("--checkpoint", required=True, help="Run folder whose policy is scored.")
    parser.add_argument("--data", help="Preference pairs, as for training; --data-path says the same.")
    parser.add_argument("--output", help="JSONL file: one object per pair.")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_command(_score, argv)


def _score(argv: list[str]) -> None:
    arguments, config, given = parse_settings(build_parser(), argv)
    refuse_fp8(config.parallel, "scoring")
    config.run.load = arguments.checkpoint
    if arguments.data and config.data.data_path and rank() == 0:
        print(f"note: --data {arguments.data} is scored, not data_path {config.data.data_path}", flush=True)
    config.data.data_path = arguments.data or config.data.data_path
    if config.data.data_path is None:
        raise UserError("--data FILE is missing: which pairs are to be scored?")
    if arguments.output and not Path(arguments.output).resolve().parent.is_dir():
        raise UserError(f"--output {arguments.output}: its folder does not exist")

    from megatron_dtrpo.runtime import initialize

    initialize.enable_device()
    from megatron_dtrpo.training.setup import follow_run, prepare

    run = _find_run(config, arguments.checkpoint)
    follow_run(config, given, run)
    _refer_to_base(config, given)
    _drop_missing_reference(config.run, given)

    with tempfile.TemporaryDirectory() as scratch:
        config.data.data_cache_path = config.data.data_cache_path or scratch
        tokenizer, data_parallel = prepare(config, given, training=False)
        with initialize.process_groups(config.parallel, config.optimizer.seed):
            rows = _rows(config, tokenizer, data_parallel, None if "reference" in given else run)
    if initialize.rank() == 0:
        _report(rows, config.run.reference, arguments.output)


def _find_run(config, checkpoint: str) -> Path:
    """The folder of the run that is scored: the checkpoint's, or that of the adapter beside it."""
    from megatron_dtrpo.checkpoint.adapter import base_and_adapter
    from megatron_dtrpo.checkpoint.iterations import require_latest

    base, adapter = base_and_adapter(checkpoint, config.run.load_adapter)
    require_latest(base)
    config.run.load, config.run.load_adapter = str(base), adapter and str(adapter)
    return adapter or base


def _refer_to_base(config, given: set[str]) -> None:
    """Without an adapter that no run trained here, the model is its reference."""
    run = config.run
    if run.load_adapter is not None and run.reference is None and "reference" not in given:
        run.reference = run.load if config.objective.has_reference else None


def _drop_missing_reference(run, given: set[str]) -> None:
    """Goes on without a reference that the run names and that is gone; one that was asked for must be there."""
    from megatron_dtrpo.runtime import initialize

    if "reference" in given or run.reference is None or Path(run.reference).is_dir():
        return
    if initialize.rank() == 0:
        where = f"{run.load}: its reference {run.reference} is not there"
        print(f"warning: {where}: no rewards; give --reference DIR", flush=True)
    run.reference = None


def _rows(config, tokenizer, data_parallel: int, run: Path | None) -> list[dict]:
    """``run``: whose reference it is; None: another one was asked for."""
    from megatron_dtrpo.checkpoint.folder import RUN_CONFIG
    from megatron_dtrpo.checkpoint.iterations import require_latest
    from megatron_dtrpo.runtime import initialize
    from megatron_dtrpo.training import resume
    from megatron_dtrpo.training.engine import Engine
    from megatron_dtrpo.training.scoring import score_pairs
    from megatron_dtrpo.training.setup import open_data

    base, reference = config.run.load, config.run.reference
    data = open_data(config, tokenizer)
    for line in data.remarks(config) if initialize.rank() == 0 else ():
        print(line, flush=True)
    indices = sorted(sample.index for sample in data.order.take(0, len(data.order)))
    engine = Engine.load(base, require_latest(base), config, tokenizer)
    if config.run.load_adapter is not None:
        engine.add_adapters(config.run.load_adapter)
    policy = score_pairs(engine, data.batches(config, engine.replica, data_parallel), indices)
    before = None
    if reference is not None:
        is_runs = run is not None and (run / RUN_CONFIG).exists()
        taken = resume.run_reference_iteration(run) if is_runs else require_latest(reference)
        engine.load_weights(reference, taken)
        with engine.as_reference():
            before = score_pairs(engine, data.reference_batches(config, engine.replica, data_parallel), indices)
    rows = []
    for index in indices:
        row: dict = {
            "source": data.store.location(index),
            "logps/chosen": policy[index][0],
            "logps/rejected": policy[index][1],
        }
        if before is not None:
            beta = config.objective.beta
            row["rewards/chosen"] = beta * (policy[index][0] - before[index][0])
            row["rewards/rejected"] = beta * (policy[index][1] - before[index][1])
            row["rewards/margins"] = row["rewards/chosen"] - row["rewards/rejected"]
        if ESTIMATORS[config.objective.estimator].is_of_the_decoding:
            row |= _recorded(data.store.row(index))
        rows.append(row)
    return rows


def _recorded(row: dict) -> dict:
    """The decoder's own log-likelihoods of the responses, where the data has them."""
    fields = {f"recorded/{name}": row.get(f"{name}_log_likelihood") for name in ("chosen", "rejected")}
    return {name: value for name, value in fields.items() if isinstance(value, float)}


def _report(rows: list[dict], reference: str | None, output: str | None) -> None:
    from megatron_dtrpo.evaluation.statistics import accuracy, mean
    from megatron_dtrpo.files import write_atomically

    print(f"pairs                {len(rows)}")
    if "rewards/margins" in rows[0]:
        margins = [row["rewards/margins"] for row in rows]
        print(f"reference            {reference}")
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
