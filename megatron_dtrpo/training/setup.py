"""Everything a run needs before its first step, checked before anything is allocated.

The starting point of a run, ``--load`` or the seed, is also the reference policy. A resumed run therefore loads it
again, takes the reference from it, and only then continues from its own checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
import yaml

from megatron_dtrpo.arguments import read_yaml
from megatron_dtrpo.config import Config, fill_objective_defaults, validate, validate_training
from megatron_dtrpo.data.batches import BatchBuilder, Noising
from megatron_dtrpo.data.sampler import SampleOrder, select_by_length
from megatron_dtrpo.data.token_store import TokenStore, build_token_store
from megatron_dtrpo.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import initialize
from megatron_dtrpo.training import checkpoint
from megatron_dtrpo.training.logging import check_logging

RUN_CONFIG = "run_config.yaml"


def resolve_start(config: Config, given: set[str]) -> None:
    """Fills in what the starting checkpoint decides, except the keys that were ``given``, which must agree with it."""
    run = config.run
    _return_to_first_start(config)
    if run.load is None:
        return
    checkpoint.require_latest(run.load)
    saved = checkpoint.load_model_config(run.load)
    for f in dataclasses.fields(saved):
        if f.name not in given:
            setattr(config.model, f.name, getattr(saved, f.name))
    checkpoint.check_same_architecture(config.model, saved, run.load)


def _return_to_first_start(config: Config) -> None:
    """A resumed run keeps the starting point of its first start, which is its reference policy, and what is pinned."""
    run = config.run
    if run.save is None or checkpoint.latest_iteration(run.save) is None:
        return
    record = Path(run.save) / RUN_CONFIG
    if not record.exists():
        raise UserError(
            f"{run.save}: holds a checkpoint but no {RUN_CONFIG}: give the run a folder of its own with --save"
        )
    first = read_yaml(record)
    same_folder = run.load is not None and Path(run.load).resolve() == Path(run.save).resolve()
    if run.load is None or same_folder:  # Megatron-LM's habit: --load and --save name the run
        run.load = first["load"]
    if (run.load is None) != (first["load"] is None) or (
        run.load is not None and Path(run.load).resolve() != Path(first["load"]).resolve()
    ):
        raise UserError(f"{run.save}: this run started from {first['load'] or 'random weights'}, not from {run.load}")
    _check_pinned(config, first)


# What a run is: another value makes it another run. Most of the rest may change on resume, and is said to.
_PINNED = ("seed", "objective", "estimator", "block_start", "loss_type", "trainable_modules", "bf16")
_FREE = ("data_cache_path", "seq_length", "micro_batch_size", "tokenizer_type", "tokenizer_model")


def _check_pinned(config: Config, first: dict) -> None:
    now = _resolved(config)
    for key in _PINNED:
        if now[key] != first.get(key):
            raise UserError(f"{config.run.save}: this run has {key} {first.get(key)}, not {now[key]}")


def _resolved(config: Config) -> dict:
    """All settings, with the defaults that depend on the objective filled in, as a run's record has them."""
    config = copy.deepcopy(config)
    fill_objective_defaults(config.objective)
    return config.to_flat()


def changes_since(config: Config, first: dict) -> list[str]:
    """``key old -> new`` for every setting of the data, objective and optimizer that differs from a run's record."""
    groups = (config.data, config.objective, config.optimizer)
    keys = [f.name for group in groups for f in dataclasses.fields(group) if f.name not in _FREE]
    now = config.to_flat()
    return [f"{key} {first.get(key)} -> {now[key]}" for key in keys if now[key] != first.get(key)]


def follow_run(config: Config, given: set[str], folder: str | Path) -> None:
    """Settings of the objective and of packing that were not ``given`` become those of the preference run in
    ``folder``, so that it is scored as it was trained."""
    record = Path(folder) / RUN_CONFIG
    first = read_yaml(record) if record.exists() else {}
    if first.get("objective") != "preference":
        return
    for group, keys in (
        (config.objective, [f.name for f in dataclasses.fields(config.objective)]),
        (config.data, ["seq_length", "apply_chat_template"]),
    ):
        for key in keys:
            if key not in given and first.get(key) is not None:
                setattr(group, key, first[key])


def open_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that was asked for, else the starting checkpoint's own."""
    data, load = config.data, config.run.load
    if data.tokenizer_type is None:
        if load is None:
            raise UserError("tokenizer_type is missing: give --tokenizer-type, or --load a checkpoint that has one")
        return load_tokenizer(Path(load) / checkpoint.TOKENIZER)
    return build_tokenizer(data.tokenizer_type, data.tokenizer_model, data.mask_token, data.eos_token)


def settle_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    model = config.model
    if model.vocab_size is None:
        model.vocab_size = tokenizer.vocab_size
    if tokenizer.vocab_size > model.padded_vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.padded_vocab_size}: "
            "they do not belong together"
        )


@dataclass
class Data:
    """Tokenized examples and the order in which they are visited."""

    store: TokenStore
    order: SampleOrder
    noising: Noising
    skipped: int

    def batches(self, config: Config, rank: int, ranks: int) -> BatchBuilder:
        return BatchBuilder(
            self.store,
            self.order,
            self.noising,
            global_batch_size=config.data.global_batch_size,
            micro_batch_size=config.data.micro_batch_size,
            seq_length=config.data.seq_length,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
        )


def open_data(config: Config, tokenizer: Tokenizer) -> Data:
    """Validates and tokenizes the data once per node (rank 0 first), then maps it into every process."""
    data = config.data
    cache = Path(data.data_cache_path or Path(config.run.save) / "data_cache")
    show_bar = config.run.progress and initialize.rank() == 0 and sys.stderr.isatty()
    for builder in (initialize.rank() == 0, initialize.local_rank() == 0, True):
        problem = None
        if builder:
            missing = [folder for folder in (cache, *cache.parents) if not folder.exists()]
            try:
                store = build_token_store(
                    data.data_path, config.objective.objective, tokenizer, cache, data.apply_chat_template, show_bar
                )
            except UserError as error:
                problem = str(error)
                for folder in missing:  # a run that never began leaves no empty folders behind
                    with contextlib.suppress(OSError):
                        folder.rmdir()
        _raise_together(problem)
    noising = Noising.from_config(config, tokenizer.mask_id)
    usable, skipped = select_by_length(
        store,
        lambda prompt, responses: noising.packed_length(prompt.astype(np.int64), list(responses.T.astype(np.int64))),
        data.seq_length,
        data.overlong,
    )
    _check_positions(store, usable, config)
    return Data(store, SampleOrder(usable, config.optimizer.seed, data.shuffle), noising, skipped)


def _raise_together(problem: str | None) -> None:
    """Raises UserError on every process if one of them has a ``problem``; collective. A process that left alone would
    take the others down in the middle of a collective."""
    problems: list = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for problem in problems:
        if problem is not None:
            raise UserError(problem)


def _check_positions(store: TokenStore, usable: np.ndarray, config: Config) -> None:
    prompt, responses = store.lengths
    longest = prompt[usable] + responses[usable].max(1)
    worst = int(longest.argmax())
    if longest[worst] > config.model.max_position_embeddings:
        raise UserError(
            f"{store.location(int(usable[worst]))}: {longest[worst]} tokens, the model has "
            f"max_position_embeddings {config.model.max_position_embeddings}"
        )


def prepare(config: Config, given: set[str], training: bool = True) -> tuple[Tokenizer, int]:
    """Checks the settings and opens the tokenizer.

    Args:
        given: keys that the user set, in a file or as a flag.

    Returns:
        The tokenizer and the data-parallel size.
    """
    resolve_start(config, given)
    data_parallel = validate(config, initialize.world_size())
    if training:
        validate_training(config, data_parallel)
        if Path(config.run.save).exists() and not Path(config.run.save).is_dir():
            raise UserError(f"save: {config.run.save} is a file; give a folder")
        if config.parallel.attention_backend == "flex" and initialize.device().type == "cpu":
            raise UserError("attention_backend flex has no backward pass on a CPU: leave it at auto")
        check_logging(config.run)
    tokenizer = open_tokenizer(config)
    settle_vocabulary(config, tokenizer)
    return tokenizer, data_parallel


def write_run_folder(config: Config, tokenizer: Tokenizer) -> list[str]:
    """What makes the run folder self-contained; rank 0 only. Returns what changed since the run's last start."""
    folder = Path(config.run.save)
    record = folder / RUN_CONFIG
    changes = changes_since(config, read_yaml(record)) if record.exists() else []
    checkpoint.save_model_config(folder, config.model)
    if not (folder / checkpoint.TOKENIZER).exists():
        tokenizer.save(folder / checkpoint.TOKENIZER)
    if config.run.load is not None:
        source, kept = Path(config.run.load) / checkpoint.HUGGINGFACE, folder / checkpoint.HUGGINGFACE
        if source.is_dir() and not kept.exists():
            shutil.copytree(source, kept)
    checkpoint.write_atomically(record, yaml.safe_dump(config.to_flat(), sort_keys=False))
    return changes
