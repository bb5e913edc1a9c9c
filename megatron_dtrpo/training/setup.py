"""Everything a run needs before its first step, checked before anything is allocated.

The starting point of a run, ``--load`` or the seed, is also the reference policy, unless ``--reference`` names another
one. A resumed run therefore loads it again, takes the reference from it, and only then continues from its own
checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.checkpoint.adapter import AdapterRecord, is_adapter_folder
from megatron_dtrpo.config.backends import require_trainable
from megatron_dtrpo.config.choices import leave_out_misfits
from megatron_dtrpo.config.estimators import ESTIMATORS
from megatron_dtrpo.config.rules import validate, validate_data, validate_training
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.data.batches import BatchBuilder, Noising
from megatron_dtrpo.data.recordings import require_recordings, require_steps
from megatron_dtrpo.data.sampler import SampleOrder, select_by_length
from megatron_dtrpo.data.source import data_files, left_out, listed
from megatron_dtrpo.data.tally import skipped_line
from megatron_dtrpo.data.token_store import TokenStore, build_token_store
from megatron_dtrpo.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from megatron_dtrpo.errors import StopRequest, UserError
from megatron_dtrpo.families.registry import family_of, is_autoregressive, same_predictions
from megatron_dtrpo.runtime import initialize, objects
from megatron_dtrpo.runtime.precision import check_machine, check_optimizer, transformer_engine_is_usable
from megatron_dtrpo.training import resume
from megatron_dtrpo.training.metric_log import check_logging
from megatron_dtrpo.training.reference_cache import ReferenceCache, score_inputs


def resolve_start(config: Config, given: set[str]) -> None:
    """Fills in what the starting checkpoint decides, except the keys that were ``given``, which must agree with it."""
    run = config.run
    resume.return_to_first_start(config)
    take_adapter_settings(config, given)
    if run.load is None:
        return
    _refuse_adapter(run.load, "load")
    resume.source_iteration(run, "load")
    saved = checkpoint_folder.load_model_config(run.load)
    for f in dataclasses.fields(saved):
        if f.name not in given:
            setattr(config.model, f.name, getattr(saved, f.name))
    checkpoint_folder.check_same_architecture(config.model, saved, run.load)


def take_adapter_settings(config: Config, given: set[str]) -> None:
    """The adapter of ``load_adapter`` says which one it is. Raises UserError where the ``given`` settings say
    otherwise."""
    folder, lora = config.run.load_adapter, config.lora
    if folder is None or resume.is_resumed(config.run):
        return
    if config.run.load is None:
        raise UserError("load_adapter needs load, the weights that it belongs to: give --load BASE")
    record = AdapterRecord.read(folder).settings()
    for f in dataclasses.fields(record):
        mine, theirs = getattr(lora, f.name), getattr(record, f.name)
        if f.name in given and mine != theirs and f.name != "lora_dropout":
            raise UserError(f"{folder}: an adapter of {f.name} {theirs}, not {mine}: leave it out")
    config.lora = dataclasses.replace(record, lora_dropout=lora.lora_dropout)


def _refuse_adapter(folder: str, key: str) -> None:
    """Raises UserError where weights were to be, and an adapter is."""
    if is_adapter_folder(folder):
        base = AdapterRecord.read(folder).base or "BASE"
        advice = f"give --load {base} --load-adapter {folder}" if key == "load" else "merge it into its weights first"
        raise UserError(f"{key} {folder}: holds an adapter and no other weights: {advice}")


def check_reference(config: Config, tokenizer: Tokenizer) -> None:
    """Raises UserError if the checkpoint that is to be the reference is not of this run's kind."""
    folder = config.run.reference
    if folder is None:
        return
    _refuse_adapter(folder, "reference")
    resume.source_iteration(config.run, "reference")
    check_reference_architecture(config)
    theirs = load_tokenizer(Path(folder) / checkpoint_folder.TOKENIZER, eos_token=config.data.eos_token)
    if theirs.fingerprint() != tokenizer.fingerprint():
        raise UserError(f"reference {folder}: has another tokenizer than this run: its scores would be of other tokens")


def check_reference_architecture(config: Config) -> None:
    """Raises UserError naming the first setting in which the reference differs from the model. How either was
    initialised and how either is exported does not matter."""
    folder, ours = config.run.reference, config.model
    saved = checkpoint_folder.load_model_config(folder)
    if same_predictions(family_of(saved), family_of(ours)):
        saved = dataclasses.replace(saved, family=ours.family)
    saved = dataclasses.replace(saved, init_method_std=ours.init_method_std)
    checkpoint_folder.check_same_architecture(config.model, saved, folder, "give another reference")


def follow_run(config: Config, given: set[str], folder: str | Path) -> None:
    """The reference and the settings of the objective and of packing that were not ``given`` become those of the
    preference run in ``folder``, so that it is scored as it was trained."""
    record = Path(folder) / checkpoint_folder.RUN_CONFIG
    first = resume.read_record(record) if record.exists() else {}
    if first.get("objective") != "preference":
        return
    for group, keys in (
        (config.objective, [f.name for f in dataclasses.fields(config.objective)]),
        (config.data, ["seq_length", "apply_chat_template"]),
    ):
        for key in keys:
            if key not in given and first.get(key) is not None:
                setattr(group, key, first[key])
    # Of a run's options those are followed that the estimator and the losses asked for read.
    for line in leave_out_misfits(config, given, folder):
        if initialize.rank() == 0:
            print(line, file=sys.stderr)
    own = resume.run_reference(folder)
    if "reference" not in given and config.objective.has_reference and own is not None:
        config.run.reference = own[1]


def open_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that was asked for, else the starting checkpoint's own; with the special tokens asked for."""
    data, load = config.data, config.run.load
    if data.tokenizer_type is None:
        if load is None:
            raise UserError("tokenizer_type is missing: give --tokenizer-type, or --load a checkpoint that has one")
        return load_tokenizer(Path(load) / checkpoint_folder.TOKENIZER, data.mask_token, data.eos_token)
    needs_mask = not is_autoregressive(config.model)
    return build_tokenizer(data.tokenizer_type, data.tokenizer_model, data.mask_token, data.eos_token, needs_mask)


def resolve_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    model = config.model
    if model.vocab_size is None:
        model.vocab_size = tokenizer.vocab_size
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}: "
            "they do not belong together"
        )


@dataclass
class Data:
    """Tokenized examples and the order in which they are visited."""

    store: TokenStore
    order: SampleOrder
    noising: Noising
    skipped: int

    def remarks(self, config: Config) -> list[str]:
        """Lines that the owner of the data should read: which rows are not trained on or scored, and why; what may
        surprise about the others."""
        found, budget = [], config.data.seq_length
        files = data_files(*self.store.source)
        if len(files) > 1:
            found.append(f"note: {self.store.source[0]} is {len(files)} files: {listed(files)}")
        if aside := left_out(self.store.source[0]):
            found.append(f"note: {self.store.source[0]}: {listed(aside)} are no data, they hold no row")
        if self.store.bad_rows.rows:
            found.append(f"warning: {skipped_line(self.store.bad_rows, self.store.source_rows)}")
        if self.skipped:
            total = len(self.store)
            found.append(f"warning: skipped {self.skipped} of {total} examples: longer than seq_length {budget}")
        return [*found, *self.store.notes]

    def batches(self, config: Config, rank: int, ranks: int) -> BatchBuilder:
        """What the policy is run on."""
        return self._builder(self.noising, config, rank, ranks)

    def reference_batches(self, config: Config, rank: int, ranks: int) -> BatchBuilder:
        """What the reference is run on: the same samples in the same places, under the noise of its own if it has
        any."""
        return self._builder(self.noising.for_reference(), config, rank, ranks)

    def _builder(self, noising: Noising, config: Config, rank: int, ranks: int) -> BatchBuilder:
        return BatchBuilder(
            self.store,
            self.order,
            noising,
            global_batch_size=config.data.global_batch_size,
            micro_batch_size=config.data.micro_batch_size,
            seq_length=config.data.seq_length,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
        )


def open_data(config: Config, tokenizer: Tokenizer) -> Data:
    """Validates and tokenizes the data once per node (rank 0 first), then maps it into every process."""
    data = config.data
    cache = Path(data.data_cache_path or Path(config.run.save) / checkpoint_folder.DATA_CACHE)
    show_bar = config.run.progress and initialize.rank() == 0 and sys.stderr.isatty()
    is_verified = False  # by the first process of a node, for all that map the same files
    for builder in (initialize.rank() == 0, initialize.local_rank() == 0, True):
        problem = None
        if builder:
            missing = [folder for folder in (cache, *cache.parents) if not folder.exists()]
            try:
                store = build_token_store(
                    data.data_path,
                    config.objective.objective,
                    tokenizer,
                    cache,
                    data.apply_chat_template,
                    show_bar,
                    split=data.split,
                    bad_rows=data.bad_rows,
                    assistant_turns=data.assistant_turns,
                    response_multiple=data.make_response_length_divisible_by,
                    verify=not is_verified and initialize.local_rank() == 0,
                )
                is_verified = True
            except (UserError, StopRequest) as error:
                problem = error
                for folder in missing:  # a run that never began leaves no empty folders behind
                    with contextlib.suppress(OSError):
                        folder.rmdir()
        objects.raise_together(problem)
    noising = Noising.from_config(config, tokenizer.mask_id)
    needs_steps, who = ESTIMATORS[noising.estimator].needs_steps, f"estimator {noising.estimator}"
    if needs_steps:
        require_recordings(store, who)
    usable, skipped = select_by_length(store, noising.packed_lengths(store), data.seq_length, data.overlong)
    _check_positions(store, usable, config)
    if needs_steps:
        _check_steps(store, usable, config.model.block_size, noising.block_start)
    return Data(store, SampleOrder(usable, config.optimizer.seed, data.shuffle), noising, skipped)


def _check_positions(store: TokenStore, usable: np.ndarray, config: Config) -> None:
    prompt, responses = store.lengths
    longest = prompt[usable] + responses[usable].max(1)
    worst = int(longest.argmax())
    if longest[worst] > config.model.max_position_embeddings:
        raise UserError(
            f"{store.location(int(usable[worst]))}: {longest[worst]} tokens, the model has "
            f"max_position_embeddings {config.model.max_position_embeddings}"
        )


def _check_steps(store: TokenStore, usable: np.ndarray, block_size: int, block_start: str | None) -> None:
    """Raises UserError on every process if some row's recorded steps do not fit the blocks."""
    problem = None
    if initialize.rank() == 0:
        try:
            require_steps(store, usable, block_size, block_start)
        except UserError as error:
            problem = error
    objects.raise_together(problem)


def prepare(config: Config, given: set[str], training: bool = True) -> tuple[Tokenizer, int]:
    """Checks the settings and opens the tokenizer.

    Args:
        given: keys that the user set, in a file or as a flag.

    Returns:
        The tokenizer and the data-parallel size.
    """
    resolve_start(config, given)
    data_parallel = validate(config, initialize.world_size())
    validate_data(config)
    check_machine(config.parallel)
    if training:
        validate_training(config, data_parallel)
        check_optimizer(config.parallel)
        if Path(config.run.save).exists() and not Path(config.run.save).is_dir():
            raise UserError(f"save: {config.run.save} is a file; give a folder")
        require_trainable(config.parallel.attention_backend, initialize.device().type)
        if config.parallel.optimizer_cpu_offload and not transformer_engine_is_usable():
            raise UserError("optimizer_cpu_offload needs a GPU and Transformer Engine: leave it out here")
        check_logging(config.run)
        if config.lora.lora_rank is not None and config.run.load is None:
            raise UserError("lora_rank needs load, the weights that adapters are trained beside: give --load BASE")
    tokenizer = open_tokenizer(config)
    resolve_vocabulary(config, tokenizer)
    check_reference(config, tokenizer)
    if training and config.run.reference_cache is not None:
        ReferenceCache(config.run.reference_cache).require(score_inputs(config, tokenizer))
    return tokenizer, data_parallel
