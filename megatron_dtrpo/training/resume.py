"""What a resumed run may not change: its starting point, its seed, its objective and its data.

The first start writes its settings to ``run_config.yaml``, and every checkpoint records the data; a later start must
agree with both. Most other settings may change, and the terminal says so.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

from megatron_dtrpo.checkpoint import distributed as checkpoint
from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.checkpoint import iterations
from megatron_dtrpo.config.estimators import ESTIMATORS
from megatron_dtrpo.config.lora import DEFAULT_TARGETS, LoraSettings
from megatron_dtrpo.config.rules import fill_objective_defaults
from megatron_dtrpo.config.settings import FIELDS, Config, ModelSettings, RunSettings
from megatron_dtrpo.config.yaml_file import read_yaml
from megatron_dtrpo.errors import UserError

# What a run is: another value makes it another run. The options that its estimator reads belong to it.
_PINNED = (
    *("seed", "shuffle", "objective", "estimator", "block_start", "loss_type", "trainable_modules", "bf16"),
    *("length_normalization", "fp8_format", "fp8_recipe", "fp8_reference"),
    *("ratio", "rollout_prompts", "group_size", "rewards", "updates_per_rollout"),
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora"),
)
_FREE = ("data_cache_path", "seq_length", "micro_batch_size", "tokenizer_type", "tokenizer_model")

# What a checkpoint records of the data, and how a message says it.
_DATA_RECORD = {
    "data": "trains on other data",
    "rows": "compares with other answers, or its rows have other columns",
    "tokenizer": "has another tokenizer",
    "usable_examples": "visits another number of examples an epoch (seq_length decides which are skipped)",
}


def read_record(path: str | Path) -> dict:
    """The settings that a run was started with, in the words of this version. Raises UserError."""

    def update(record: dict) -> dict:
        record = _in_new_words(record)
        if unknown := [key for key in record if key not in FIELDS]:
            raise UserError(
                f"{path}: written by a version with a setting {unknown[0]}, which this one does not know: use that "
                "version, or take the line out of the file if its value does not matter"
            )
        return record

    return read_yaml(path, update=update)


def _in_new_words(record: dict) -> dict:
    """The anchor was a setting of its own, ``rpo_alpha``, with 0 for none, and is a loss now."""
    record = dict(record)
    weight = record.pop("rpo_alpha", 0)
    if weight:
        record |= {"loss_type": [record["loss_type"], "sft"], "loss_weights": [1.0, weight]}
    return record


def is_resumed(run: RunSettings) -> bool:
    """Whether the run folder has a checkpoint to go on from."""
    return run.save is not None and iterations.latest_iteration(run.save) is not None


def return_to_first_start(config: Config) -> None:
    """A resumed run keeps the starting point of its first start, which is its reference policy, its special tokens,
    and what is pinned."""
    run = config.run
    if not is_resumed(run):
        return
    record = Path(run.save) / checkpoint_folder.RUN_CONFIG
    if not record.exists():
        raise UserError(
            f"{run.save}: holds a checkpoint but no {checkpoint_folder.RUN_CONFIG}: give the run a folder of its own "
            "with --save"
        )
    first = read_record(record)
    if "load" not in first:
        raise UserError(
            f"{record}: damaged: it has no settings; bring a copy back, or --load {run.save} into a new run"
        )
    same_folder = run.load is not None and Path(run.load).resolve() == Path(run.save).resolve()
    if run.load is None or same_folder:  # Megatron-LM's habit: --load and --save name the run
        run.load = first["load"]
    if (run.load is None) != (first["load"] is None) or (
        run.load is not None and Path(run.load).resolve() != Path(first["load"]).resolve()
    ):
        raise UserError(f"{run.save}: this run started from {first['load'] or 'random weights'}, not from {run.load}")
    for key in ("mask_token", "eos_token"):
        given, theirs = getattr(config.data, key), first.get(key)
        if given is None:
            setattr(config.data, key, theirs)
        elif theirs is not None and given != theirs:  # of its tokenizer's own tokens the data's fingerprint knows
            raise UserError(f"{run.save}: this run has {key} {theirs}, not {given}")
    _return_to_reference(run, first)
    _return_to_adapter(config, first)
    _check_pinned(config, first)


def _return_to_adapter(config: Config, first: dict) -> None:
    """The adapter that the run began with, and the rank and the layers of its own."""
    run, lora = config.run, config.lora
    now, theirs = run.load_adapter, first.get("load_adapter")
    if now is not None and (theirs is None or Path(now).resolve() != Path(theirs).resolve()):
        raise UserError(f"{run.save}: this run started from {theirs or 'no adapter'}, not from {now}")
    run.load_adapter = theirs
    if theirs is not None and lora.lora_rank is None:  # as at the first start, the adapter says what it is
        mine = {f.name: (getattr(lora, f.name), f.default) for f in dataclasses.fields(LoraSettings)}
        config.lora = LoraSettings(
            **{name: first[name] if value == default else value for name, (value, default) in mine.items()}
        )
    elif lora.lora_rank is not None and lora.lora_target_modules is None:
        lora.lora_target_modules = list(DEFAULT_TARGETS)


def _return_to_reference(run: RunSettings, first: dict) -> None:
    """A reference of its own, and the starting point where there was none, stay the reference."""
    theirs = first.get("reference")  # a run may be older than the setting
    now, then = run.reference, theirs or first["load"]
    if now is not None and (then is None or Path(now).resolve() != Path(then).resolve()):
        raise UserError(f"{run.save}: this run's reference is {then or 'its random starting weights'}, not {now}")
    run.reference = theirs


def source_iteration(run: RunSettings, key: str) -> int:
    """The iteration that a run takes from the checkpoint folder ``load`` or ``reference``, which the setting ``key``
    names: the latest, on a resume the one that the first start took. Raises UserError if there is none."""
    return _source_iteration(run.save, key, getattr(run, key))


def run_reference(folder: str | Path) -> tuple[str, str] | None:
    """The setting that names the reference of the preference run in ``folder``, and the checkpoint folder that it
    names; None where the reference is random weights."""
    first = read_record(Path(folder) / checkpoint_folder.RUN_CONFIG)
    key = "reference" if first.get("reference") else "load"  # a run may be older than the setting
    return None if first[key] is None else (key, first[key])


def run_reference_iteration(folder: str | Path) -> int:
    """The iteration that the run in ``folder`` took from its reference's. Raises UserError if it is gone."""
    return _source_iteration(folder, *run_reference(folder))


def _source_iteration(run_folder: str | Path | None, key: str, folder: str | Path) -> int:
    first, resumed = None, None if run_folder is None else iterations.latest_iteration(run_folder)
    if resumed is not None:
        first = checkpoint.load_progress(run_folder, resumed).get(f"{key}_iteration")
    if first is None:
        return iterations.require_latest(folder)
    if first not in iterations.complete_iterations(Path(folder)):
        role = {"load": "this run started from", "reference": "this run's reference is"}[key]
        raise UserError(f"{folder}: {role} its iteration {first}, which is not there any more")
    return first


def source_iterations(run: RunSettings) -> dict:
    """A checkpoint's record of the checkpoints that its run began with."""
    keys = [key for key in ("load", "reference") if getattr(run, key) is not None]
    return {f"{key}_iteration": source_iteration(run, key) for key in keys}


def _check_pinned(config: Config, first: dict) -> None:
    now = _resolved(config, first)
    for key in (*_PINNED, *ESTIMATORS[now["estimator"]].options):
        theirs = first.get(key, FIELDS[key].default)  # a run may be older than the setting
        if now[key] != theirs:
            what = f"this run has {key} {_told(theirs)}, not {_told(now[key])}"
            raise UserError(f"{config.run.save}: {what}: give the same, or another --save")


def _told(value) -> str:
    return "none" if value is None else str(value)


def _resolved(config: Config, first: dict) -> dict:
    """All settings, with the defaults that depend on the objective and on the run's model, which its record ``first``
    names, filled in."""
    config = copy.deepcopy(config)
    known = {key: first.get(key, FIELDS[key].default) for key in ("family", "block_size")}  # a record may be older
    fill_objective_defaults(config.objective, ModelSettings(**known))
    return config.to_flat()


def data_record(content: str, tokenizer: str, usable_examples: int) -> dict:
    """A checkpoint's record of the data: fingerprints of tokens and tokenizer, and the length of an epoch."""
    return {"data": content, "tokenizer": tokenizer, "usable_examples": usable_examples}


def check_data(directory: str | Path, progress: dict, now: dict) -> None:
    """Raises UserError where ``now`` (see `data_record`) is not what the checkpoint's ``progress`` records."""
    for key, words in _DATA_RECORD.items():
        if key in progress and progress[key] != now.get(key):
            raise UserError(
                f"{directory}: this run {words}: give what it was started with, or --load {directory} into a new run"
            )


def changes_since(config: Config, first: dict) -> list[str]:
    """``key old -> new`` for every setting that has a part in a run's numbers or in how they are computed and that
    differs from its record."""
    groups = (config.parallel, config.data, config.objective, config.online, config.optimizer, config.evaluation)
    keys = [f.name for group in groups for f in dataclasses.fields(group) if f.name not in _FREE]
    now = config.to_flat()
    before = {key: first.get(key, FIELDS[key].default) for key in keys}  # a run may be older than the setting
    return [f"{key} {before[key]} -> {now[key]}" for key in keys if now[key] != before[key]]
