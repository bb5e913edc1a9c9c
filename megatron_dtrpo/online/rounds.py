"""Rounds of ``objective preference``: the policy answers prompts, its answers become pairs, it trains on them.

A round has a folder of its own, ``round-1``, ``round-2`` and so on. It is the run folder that `megatron-dtrpo train`
makes of the pairs in its ``pairs.jsonl``, and these are what `megatron-dtrpo pairs` makes with the checkpoint that the
round starts from. A round's folder appears when the one before is finished: the last one there is where rounds go on.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_dtrpo.checkpoint import iterations
from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.settings import Config, OnlineSettings, RoundSettings
from megatron_dtrpo.data.sampler import SampleOrder
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import StopRequest, UserError
from megatron_dtrpo.evaluation.generation import decode_prompts, speed
from megatron_dtrpo.files import write_json
from megatron_dtrpo.online.pairs import Pairs, Rewarded, different
from megatron_dtrpo.online.prompts import fingerprint, open_prompts, rows_fingerprint
from megatron_dtrpo.online.reward_workers import RewardWorkers
from megatron_dtrpo.online.rollouts import RolloutMaker, Rollouts, report_failures, rollout_seed
from megatron_dtrpo.runtime import initialize, objects
from megatron_dtrpo.training.engine import Engine
from megatron_dtrpo.training.run_folder import run_folder
from megatron_dtrpo.training.setup import prepare

RECORD = "rounds.json"
PAIRS = "pairs.jsonl"
ANSWERS = "answers.json"
# What rounds are: another value makes them others. Not yet made ones may have another length or learning rate.
_PINNED = (
    *("seed", "load", "load_adapter", "lora_rank", "reference", "rewards", "reward_weights", "group_size"),
    *("rollout_max_new_tokens", "rollout_temperature", "rollout_rule", "rollout_threshold", "rollout_denoising_steps"),
    *("rollout_small_block_size", "round_prompts", "pairs_per_prompt", "move_reference"),
)


def round_folder(save: str | Path, number: int) -> Path:
    return Path(save) / f"round-{number}"


def settings_of_round(config: Config, number: int, has_reference: bool, adapted: bool) -> Config:
    """The settings with which `megatron-dtrpo train` does the training of round ``number``, from 1. ``has_reference``:
    of the objective of ``config``. ``adapted``: adapters are trained, beside the weights that all rounds have."""
    own, save = copy.deepcopy(config), config.run.save
    own.online, own.rounds = OnlineSettings(), RoundSettings()
    own.run.save = str(round_folder(save, number))
    own.data.data_path, own.data.split, own.data.bad_rows = str(round_folder(save, number) / PAIRS), None, "error"
    if number > 1 and adapted:
        own.run.load_adapter = str(round_folder(save, number - 1))
    elif number > 1:
        own.run.load = str(round_folder(save, number - 1))
        kept = has_reference and not config.rounds.move_reference
        own.run.reference = (config.run.reference or config.run.load) if kept else None
    return own


class Rounds:
    """Built from the settings as they were given, then `run`; collective."""

    def __init__(self, config: Config, whole: Config, given: set[str], tokenizer: Tokenizer, evaluation: Callable):
        """``whole``: the same settings, validated. ``evaluation``: from settings and tokenizer to the evaluation of a
        round, or None. Raises UserError for prompts that cannot be used."""
        self.config, self.given, self.evaluation = config, given, evaluation
        self.total, self.has_reference = config.rounds.rounds, whole.objective.has_reference
        self.adapted = whole.lora.lora_rank is not None
        self.prompts, self.notes = open_prompts(whole, tokenizer)
        self.count = config.rounds.round_prompts or len(self.prompts)
        if self.count > len(self.prompts):
            raise UserError(f"round_prompts {self.count}: {config.data.data_path} has {len(self.prompts)} prompts")
        self.is_main, online = initialize.rank() == 0, config.online
        self.workers = RewardWorkers(online.rewards, online.reward_workers, online.reward_timeout)
        rollouts = copy.deepcopy(whole)
        rollouts.online.rollout_prompts, rollouts.online.drop_equal_groups = self.count, False
        order = SampleOrder(np.arange(len(self.prompts)), config.optimizer.seed, shuffle=False)
        self.maker = RolloutMaker(rollouts, self.prompts, order, self.workers if self.is_main else None, decode_prompts)

    def run(self) -> None:
        """Goes on with the last round that was begun, to the last one. A request to stop ends it, and the same command
        goes on."""
        self._keep_record()
        begun = objects.broadcast(self._begun())
        if begun > self.total:
            raise UserError(f"rounds {self.total}: {self.config.run.save} has {begun} already: give as many or more")
        for line in self.notes:
            self._say(line)
        number = max(begun, 1)
        try:
            while number <= self.total and self._round(number):
                number += 1
        except StopRequest as request:
            self._say(f"stopped by {request}")
        finally:
            self.workers.close()
        if number > self.total:
            last = round_folder(self.config.run.save, self.total)
            self._say(f"done: {last} is the run of the last round; a larger --rounds adds some")
        else:
            self._say(f"round {number} of {self.total} is not finished: start the same command again")

    def _begun(self) -> int:
        """The last round that has a folder, or 0."""
        numbers = [path.name.partition("-")[2] for path in Path(self.config.run.save).glob("round-*") if path.is_dir()]
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def _keep_record(self) -> None:
        """Raises UserError on every process where the folder holds rounds that are not these."""
        problem = None
        if self.is_main:
            try:
                self._compare_record(Path(self.config.run.save) / RECORD)
            except UserError as error:
                problem = error
        objects.raise_together(problem)

    def _compare_record(self, path: Path) -> None:
        flat, run = self.config.to_flat(), self.config.run
        prompts = f"{len(self.prompts)} of fingerprint {fingerprint(self.prompts)}"
        rows = f"of fingerprint {rows_fingerprint(self.prompts)}"
        now = {key: flat[key] for key in _PINNED} | {"prompts": prompts, "rows": rows}
        for key in ("load", "load_adapter", "reference"):
            folder = getattr(run, key)
            now[key] = None if folder is None else str(Path(folder).resolve())
            now[f"{key}_iteration"] = None if folder is None else iterations.require_latest(folder)
        try:
            then = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error}): delete it if the settings are still the same") from None
        for key, value in now.items():
            if then.get(key) != value and (key != "rows" or key in then):  # rounds may be older than that
                raise UserError(
                    f"{run.save}: these rounds have {key} {then.get(key)}, not {value}: give another folder"
                )
        if not path.exists():
            write_json(path, now)

    def _round(self, number: int) -> bool:
        """One round, or what is left of it. Returns whether it is finished."""
        own = settings_of_round(self.config, number, self.has_reference, self.adapted)
        objects.stop_together()
        with run_folder(own.run.save):
            tokenizer, replicas = prepare(own, self.given)
            evaluation = self.evaluation(own, tokenizer)
            if not objects.broadcast(Path(own.data.data_path).exists()):
                self._make_pairs(number, own, tokenizer)
                gc.collect()  # the model that answered, before another one is built
            self._say(f"round {number} of {self.total}: training on {own.data.data_path}")
            trainer = OBJECTIVES[own.objective.objective].trainer(own, tokenizer, replicas, evaluation)
            trainer.run()
            finished = trainer.iteration >= trainer.train_iters
        del trainer
        gc.collect()
        return finished

    def _make_pairs(self, number: int, own: Config, tokenizer: Tokenizer) -> None:
        """Writes the pairs of round ``number``. Raises SharedError where there are none, and StopRequest."""
        seed = rollout_seed(own.optimizer.seed, number)
        which = "all" if self.count == len(self.prompts) else f"the next {self.count}"
        who = own.run.load_adapter or own.run.load
        self._say(f"round {number} of {self.total}: {who} answers {which} prompts, with --seed {seed}")
        engine = Engine.starting(_for_decoding(own), tokenizer, own.run.load_adapter)
        with engine.for_evaluation():
            found = self.maker.make(engine, number, (number - 1) * self.count)
        problem = None
        if self.is_main:
            try:
                self._write_pairs(number, found, Path(own.data.data_path))
            except UserError as error:
                problem = error
        objects.raise_together(problem)

    def _write_pairs(self, number: int, found: Rollouts, path: Path) -> None:
        report_failures(found.failures)
        pairs = Pairs(self.config.rounds.pairs_per_prompt)
        for group in found.decoded:
            answers = [
                Rewarded(*each) for each in zip(group.completions, group.texts, group.total.tolist(), strict=True)
            ]
            pairs.add(group.prompt, [answers[place] for place in different(group.completions)])
        where = f"round {number} of {self.total}"
        if not pairs.lines:
            longer = "rollout_max_new_tokens, " if pairs.endless else ""
            raise UserError(
                f"{where}: no prompt has a better and a worse answer ({pairs.counts} in all): raise {longer}group_size "
                "or rollout_temperature, or take other prompts or another reward"
            )
        write_json(path.with_name(ANSWERS), self._measured(number, found, pairs))
        pairs.write(path)
        completions = [one for group in found.decoded for one in group.completions]
        self._say(f"{where}: {speed(completions, found.seconds['rollout'])}")
        self._say(
            f"{where}: {pairs.answers} different answers ({pairs.counts}), {len(pairs.lines)} pairs of {pairs.paired} "
            f"prompts; {self.count - pairs.paired} prompts have no pair"
        )

    def _measured(self, number: int, found: Rollouts, pairs: Pairs) -> dict:
        """Of a round's answers, in the words of an online run's metrics."""
        total = np.concatenate([group.total for group in found.decoded])
        completions = [one for group in found.decoded for one in group.completions]
        tokens = sum(len(one.tokens) for one in completions)
        return {
            "round": number,
            "prompts": self.count,
            "answers": len(completions),
            "tokens": tokens,
            "reward/mean": float(total.mean()),
            "reward/std": float(total.std()),
            "reward/accuracy": float((total > 0).mean()),
            "reward/failed": len(found.failures),
            "response/length": sum(len(one.answer) for one in completions) / len(completions),
            "tokens_per_pass": tokens / sum(one.passes for one in completions),
            "pairs": len(pairs.lines),
            "prompts/paired": pairs.paired,
            "seconds/rollout": found.seconds["rollout"],
            "seconds/rewards": found.seconds["rewards"],
        }

    def _say(self, message: str) -> None:
        if self.is_main:
            print(message, flush=True)


def _for_decoding(config: Config) -> Config:
    """A sub-block may hold fewer tokens than there are tensor-parallel processes or than FP8 asks for."""
    config = copy.deepcopy(config)
    config.parallel.sequence_parallel, config.parallel.fp8_format = False, None
    config.parallel.fp8_param_gather = False
    return config


def run_rounds(config: Config, given: set[str], evaluation: Callable) -> None:
    """Trains in rounds, on all processes. ``evaluation``: as of `Rounds`. Raises UserError."""
    whole = copy.deepcopy(config)
    save = config.run.save
    if save is not None and iterations.latest_iteration(save) is not None:
        raise UserError(f"save: {save} is the folder of a run without rounds: give another folder")
    tokenizer, _ = prepare(whole, given)
    with initialize.process_groups(config.parallel, config.optimizer.seed), run_folder(save):
        objects.stop_together()
        Rounds(config, whole, given, tokenizer, evaluation).run()
