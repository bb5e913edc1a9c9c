"""``objective policy_gradient``: an iteration decodes, rewards, and takes one or more optimizer steps."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.data.sampler import SampleOrder
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import SharedError
from megatron_dtrpo.evaluation.generation import decode_prompts
from megatron_dtrpo.objectives.policy_gradient import Rollout, clipped_ratios
from megatron_dtrpo.online.documents import Documents, Packed
from megatron_dtrpo.online.prompts import fingerprint, open_prompts, rows_fingerprint
from megatron_dtrpo.online.reward_workers import RewardWorkers
from megatron_dtrpo.online.rollouts import RolloutMaker, Rollouts, report_failures
from megatron_dtrpo.runtime import objects
from megatron_dtrpo.runtime.transfer import to_device
from megatron_dtrpo.training import resume
from megatron_dtrpo.training.device_batch import DeviceBatch, HostBatch
from megatron_dtrpo.training.metric_log import drop_later_lines
from megatron_dtrpo.training.run import Run, Update

ROLLOUTS_FILE = "rollouts.jsonl"


class OnlineTrainer(Run):
    """Built from a validated configuration, then `run`."""

    unit = "iterations"

    def __init__(self, config: Config, tokenizer: Tokenizer, data_parallel_size: int, evaluation=None):
        """``evaluation``: of `evaluation.periodic`, or None. Raises UserError for prompts that cannot be used."""
        self.prompts, self.notes = open_prompts(config, tokenizer)
        self.equal = 0  # iterations in a row in which no group had a spread
        online, count = config.online, len(self.prompts)
        order = SampleOrder(np.arange(count), config.optimizer.seed, config.data.shuffle)
        record = resume.data_record(fingerprint(self.prompts), tokenizer.fingerprint(), count)
        rank = parallel_state.get_data_parallel_rank()
        self.documents = Documents(config, tokenizer.mask_id, rank, data_parallel_size)
        super().__init__(
            config,
            tokenizer,
            OBJECTIVES[config.objective.objective](config.objective),
            train_iters=config.optimizer.steps(count, online.rollout_prompts),
            updates=online.updates_per_rollout,
            data_record=record | {"rows": rows_fingerprint(self.prompts)},
            evaluation=evaluation,
        )
        self.workers = RewardWorkers(online.rewards, online.reward_workers, online.reward_timeout)
        self.maker = RolloutMaker(config, self.prompts, order, self.workers if self.is_main else None, decode_prompts)

    def remarks(self) -> list[str]:
        heldout = self.evaluation.remarks() if self.evaluation is not None else []
        return self.notes + heldout

    def _go_on_from(self, progress: dict) -> None:
        super()._go_on_from(progress)
        self.equal = progress.get("equal_iterations", 0)

    def _progress(self) -> dict:
        return super()._progress() | {"equal_iterations": self.equal}

    def _place(self, index: int) -> str:
        return self.prompts[index].location

    def _train(self) -> None:
        objects.stop_together()
        if self.is_main:
            drop_later_lines(Path(self.config.run.save) / ROLLOUTS_FILE, self.iteration)
        if self._lacks_evaluation():
            self._evaluate()
        try:
            while self.iteration < self.train_iters:
                self._after_iteration(self._iterate())
        finally:
            self.workers.close()

    def _iterate(self) -> bool:
        """One iteration. Returns whether some process was asked to stop before it ended."""
        with self.engine.for_evaluation():
            rollouts = self.maker.make(self.engine, self.iteration, self.consumed)
        objects.stop_together()
        if not rollouts.decoded:
            raise SharedError(
                f"iteration {self.iteration + 1}: no group has two answers with a reward: {rollouts.failures[0]}; "
                f"{self._last_checkpoint()}"
            )
        started, lr = time.perf_counter(), self.engine.learning_rate()
        learned = self._learn(rollouts)
        self.iteration += 1
        self.consumed += rollouts.prompts
        if self.log is not None:
            report_failures(rollouts.failures)
            self._record(rollouts)
            self.log.step(self._metrics(rollouts, learned, lr, time.perf_counter() - started))
        self._check_spread(rollouts)
        return any(update.stopping for update in learned[0])

    def _learn(self, rollouts: Rollouts) -> tuple[list[Update], float]:
        """The optimizer steps, each on its share of the groups, and the largest gap between the decoder's and the
        trainer's log-probabilities."""
        wanted = self.config.online.updates_per_rollout
        shares = np.array_split(np.arange(len(rollouts.groups)), wanted)
        parts = [[rollouts.groups[number] for number in share] for share in shares if len(share)]
        prepared = [self._prepared(self.documents.batches(part)) for part in parts]
        for batches, _ in prepared if len(prepared) > 1 else []:
            self._give(batches, "old", self.engine.log_probs(batches))
        if self.reference is not None:
            for batches, _ in prepared:
                with self.reference.in_place_of_policy(), self.engine.as_reference():
                    self._give(batches, "reference", self.engine.log_probs(batches))
        updates = []
        for number, (batches, packed) in enumerate(prepared):
            if number and self.config.objective.self_normalize:  # before, all ratios are 1
                self._self_normalize(batches, len(parts[number]))
            updates.append(self._update(batches, packed))
        if missing := wanted - len(updates):
            self.engine.scheduler.step(increment=missing)  # a rate belongs to its iteration
        return updates, self._largest(updates)

    def _prepared(self, packed: Sequence[Packed]) -> tuple[list[DeviceBatch], int]:
        """On the device, with what is known of the answers, and how many tokens they pack into."""
        hosts: list[HostBatch] = [self.engine.prepare(one.batch) for one in packed]
        batches = self.engine.to_device(hosts)
        for batch, one in zip(batches, packed, strict=True):
            known = one.rollout
            if known.recorded is not None:  # as wide as the steps that are laid out
                extra = batch.steps - known.recorded.shape[1]
                known = known._replace(recorded=torch.nn.functional.pad(known.recorded, (0, extra)))
            batch.given = Rollout(*(each if each is None else to_device(each, self.engine.device) for each in known))
        return batches, sum(host.tokens for host in hosts)

    def _self_normalize(self, batches: list[DeviceBatch], groups: int) -> None:
        """Gives the answers of an update the mean clipped ratio of their group, parts of which may be elsewhere."""
        found = self.engine.measure(batches, partial(clipped_ratios, self.config.objective))
        if not parallel_state.is_pipeline_last_stage():
            return
        sums = torch.zeros(groups, 2, dtype=torch.float64, device=self.engine.device)
        for batch, part in zip(batches, found, strict=True):
            sums.index_add_(0, batch.given.group, part)
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        mean = sums[:, 0] / sums[:, 1]
        self._give(batches, "mean_ratio", [mean[batch.given.group] for batch in batches])

    @staticmethod
    def _give(batches: list[DeviceBatch], name: str, values: list[torch.Tensor]) -> None:
        """On the last stage, which alone has ``values``."""
        for batch, value in zip(batches, values, strict=False):
            batch.given = batch.given._replace(**{name: value})

    def _largest(self, updates: Sequence[Update]) -> float:
        found = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for outcome in (outcome for update in updates for outcome in update.outcomes):
            if outcome.largest is not None:
                found = torch.maximum(found, outcome.largest.double())
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def _check_spread(self, rollouts: Rollouts) -> None:
        """Says when nothing was learned, and ends a run that learns nothing."""
        self.equal = 0 if rollouts.groups else self.equal + 1
        if rollouts.groups:
            return
        why = f"all answers to each of {rollouts.prompts} prompts have one reward"
        self._say(f"warning: iteration {self.iteration}: {why}: nothing was learned")
        if self.equal >= self.config.online.equal_iterations:
            raise SharedError(
                f"{why}, for {self.equal} iterations in a row: take easier or harder prompts, more answers "
                f"(group_size) or another reward; {self._last_checkpoint()}"
            )

    def _metrics(self, rollouts: Rollouts, learned: tuple[list[Update], float], lr: float, seconds: float) -> dict:
        """``lr``: of the iteration's first update."""
        updates, largest = learned
        online, groups = self.config.online, rollouts.decoded
        names = self.objective.metric_names
        counts = sum(update.count for update in updates)
        means = {name: sum(u.sums[name] for u in updates) / max(counts, 1) for name in names}
        total = np.concatenate([group.total for group in groups])
        completions = [one for group in groups for one in group.completions]
        tokens, passes = sum(len(one.tokens) for one in completions), sum(one.passes for one in completions)
        each = {}
        if len(online.rewards) > 1:
            table = np.concatenate([group.rewards for group in groups])
            each = {f"reward/{name}": float(table[:, k].mean()) for k, name in enumerate(online.rewards)}
        packed = sum(update.tokens for update in updates)
        return {
            "iteration": self.iteration,
            "consumed_samples": self.consumed,
            **means,
            "rollout/logp_gap_max": largest,
            "reward/mean": float(total.mean()),
            "reward/std": float(total.std()),
            "reward/accuracy": float((total > 0).mean()),
            **each,
            "reward/failed": len(rollouts.failures),
            "groups/dropped": len(groups) - len(rollouts.groups),
            "groups/trained": len(rollouts.groups),
            "response/length": sum(len(one.answer) for one in completions) / len(completions),
            "tokens_per_pass": tokens / passes,
            "grad_norm": updates[-1].grad_norm if updates else 0.0,
            "lr": lr,
            "seconds/rollout": rollouts.seconds["rollout"],
            "seconds/rewards": rollouts.seconds["rewards"],
            "seconds/training": seconds,
            "tokens_per_second": packed / seconds,
        }

    def _record(self, rollouts: Rollouts) -> None:
        """Appends the answers of the iteration's first group to the run's sample of rollouts."""
        group = rollouts.decoded[0]
        line = {
            "iteration": self.iteration,
            "location": group.prompt.location,
            "prompt": group.prompt.text,
            "completions": group.texts,
            "rewards": group.rewards.tolist(),
            "advantages": group.advantages.tolist(),
            "passes": [one.passes for one in group.completions],
        }
        with (Path(self.config.run.save) / ROLLOUTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
