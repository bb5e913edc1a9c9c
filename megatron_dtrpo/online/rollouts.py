"""One iteration's answers: prompts in the order of the data, groups of answers, their rewards and advantages.

All of it is a function of the weights, the seed, the iteration and the prompt: not of how many processes there are.
"""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megatron_dtrpo.config.decoding import DecodingOptions, default_small_block
from megatron_dtrpo.config.online_rules import rollout_rule
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.data.sampler import SampleOrder
from megatron_dtrpo.diffusion.decoding import Completion
from megatron_dtrpo.errors import StopRequest, UserError
from megatron_dtrpo.online.advantages import group_advantages, has_spread
from megatron_dtrpo.online.reward_workers import RewardWorkers
from megatron_dtrpo.online.rewards import Answer
from megatron_dtrpo.runtime import objects
from megatron_dtrpo.seeds import stable_seed
from megatron_dtrpo.training.engine import Engine

if TYPE_CHECKING:
    from megatron_dtrpo.data.prompts import Prompt


@dataclass(frozen=True)
class Group:
    """The answers to one prompt that could be rewarded. ``sample``: the visit to the prompt. ``members``: each answer's
    number among those that were decoded, from 0. ``rewards`` fp64 ``[n, k]``, ``total`` and ``advantages`` ``[n]``."""

    sample: Sample
    prompt: Prompt
    members: list[int]
    completions: list[Completion]
    texts: list[str]
    rewards: np.ndarray
    total: np.ndarray
    advantages: np.ndarray


@dataclass
class Rollouts:
    """``groups`` to train on; ``decoded``: all of them, those without spread too. ``prompts``: how many were taken.
    ``failures``: why answers have no reward. ``seconds`` of rollout and of rewards."""

    groups: list[Group] = field(default_factory=list)
    decoded: list[Group] = field(default_factory=list)
    prompts: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"rollout": 0.0, "rewards": 0.0})


def rollout_options(config: Config) -> DecodingOptions:
    """How answers are decoded, so that training can replay it."""
    online, rule = config.online, rollout_rule(config)
    default = default_small_block(config.model.block_size, rule, online.rollout_max_new_tokens)
    return DecodingOptions(
        max_new_tokens=online.rollout_max_new_tokens,
        rule=rule,
        threshold=online.rollout_threshold,
        denoising_steps=online.rollout_denoising_steps,
        small_block_size=online.rollout_small_block_size or default,
        temperature=online.rollout_temperature,
        top_p=1.0,
    )


def rollout_seed(seed: int, iteration: int, number: int = 0) -> int:
    """Of the answers to an iteration's prompts; ``number``: how often others were taken before."""
    return stable_seed(struct.pack("<3q", seed, iteration, number))


class RolloutMaker:
    """Decodes and rewards. Every process has one; rank zero's has the reward workers."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        order: SampleOrder,
        workers: RewardWorkers | None,
        decode: Callable,
    ):
        """``decode``: as `evaluation.generation.decode_prompts`."""
        self.decode = decode
        self.config, self.prompts, self.order, self.workers = config, prompts, order, workers
        self.options = rollout_options(config)
        names = config.online.rewards
        self.weights = config.online.reward_weights or [1.0] * len(names)
        self.apart = config.online.reward_aggregation == "normalize_then_sum"

    def make(self, engine: Engine, iteration: int, consumed: int) -> Rollouts:
        """The rollouts of ``iteration``, of the prompts after the first ``consumed``; collective, the same on every
        process. Raises StopRequest on every process where one was asked to stop."""
        online, found = self.config.online, Rollouts()
        rounds = 1 + (online.resamplings if online.drop_equal_groups else 0)
        for number in range(rounds):
            wanted = online.rollout_prompts - len(found.groups)
            if not wanted:
                break
            samples = self.order.take(consumed + found.prompts, wanted)
            found.prompts += wanted
            for group in self._groups(engine, samples, (iteration, number), found):
                found.decoded.append(group)
                if not online.drop_equal_groups or has_spread(group.rewards, self.weights, self.apart):
                    found.groups.append(group)
            if not found.decoded:  # it is the rewards that fail: other prompts would not help
                break
        return found

    def _groups(self, engine: Engine, samples: Sequence[Sample], when: tuple[int, int], found: Rollouts) -> list[Group]:
        online, started = self.config.online, time.perf_counter()
        prompts = [self.prompts[sample.index] for sample in samples]
        completions = self.decode(
            engine,
            prompts,
            self.options,
            batch_size=online.rollout_batch_size,
            seed=rollout_seed(self.config.optimizer.seed, *when),
            samples=online.group_size,
            progress=self.config.run.progress,
        )
        decoded = time.perf_counter()
        texts = [[engine.tokenizer.decode(one.answer) for one in each] for each in completions]
        answers = [
            Answer(
                prompt.row,
                text,
                tokens=len(one.answer),
                passes=one.passes,
                ended=one.ended,
                longest=self.options.max_new_tokens,
                written=len(one.tokens),
            )
            for prompt, each, words in zip(prompts, completions, texts, strict=True)
            for one, text in zip(each, words, strict=True)
        ]
        values = iter(self._rewards(answers))
        found.seconds["rollout"] += decoded - started
        found.seconds["rewards"] += time.perf_counter() - decoded
        groups = []
        for sample, prompt, each, words in zip(samples, prompts, completions, texts, strict=True):
            rewards = [next(values) for _ in each]
            found.failures += [f"{prompt.location}: {value}" for value in rewards if isinstance(value, str)]
            members = [number for number, value in enumerate(rewards) if not isinstance(value, str)]
            if len(members) > 1:
                kept = ([column[n] for n in members] for column in (each, words, rewards))
                groups.append(self._group(sample, prompt, members, *kept))
        return groups

    def _group(self, sample, prompt, members, completions, texts, rewards) -> Group:
        table = np.array(rewards, dtype=float)
        advantages = group_advantages(table, self.weights, self.config.online.advantage_std, self.apart)
        return Group(sample, prompt, members, completions, texts, table, table @ np.array(self.weights), advantages)

    def _rewards(self, answers: list[Answer]) -> list[list[float] | str]:
        """Rank zero's workers reward them all."""
        found, problem = None, None
        if self.workers is not None:
            try:
                found = self.workers.score(answers)
            except (UserError, StopRequest) as error:
                problem = error
        objects.raise_together(problem)
        return objects.broadcast(found)


def report_failures(failures: Sequence[str]) -> None:
    """Says on standard error which answers have no reward: the first ones, and how many."""
    for failure in failures[:3]:
        print(f"warning: {failure}", file=sys.stderr)
    if failures:
        print(f"warning: {len(failures)} answers have no reward and are left out", file=sys.stderr)
