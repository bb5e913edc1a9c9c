"""What a run measures of itself every so many steps: its objective on held-out data, and decoded exact match; where it
trains on its own answers, exact match alone.

The reference does not change, so its scores are computed once, before the first step.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_dtrpo.config.decoding import DecodingOptions, default_small_block
from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.data.prompts import Prompt, read_prompts
from megatron_dtrpo.data.tally import Tally
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.evaluation.generation import decode_prompts, efficiency
from megatron_dtrpo.evaluation.verifiers import Judge, load_verifier
from megatron_dtrpo.families.registry import family_of
from megatron_dtrpo.runtime import objects
from megatron_dtrpo.runtime.transfer import to_device
from megatron_dtrpo.training.engine import Engine
from megatron_dtrpo.training.passes import reduce_metrics
from megatron_dtrpo.training.scoring import CHUNK, score_pairs
from megatron_dtrpo.training.setup import open_data


def periodic_evaluation(config: Config, tokenizer: Tokenizer, data_parallel_size: int) -> AnswerEvaluation | None:
    """The evaluation that ``config`` asks for, or None."""
    if config.evaluation.eval_interval is None:
        return None
    if OBJECTIVES[config.objective.objective].is_online:
        return answer_evaluation(config, tokenizer)
    return PeriodicEvaluation(config, tokenizer, data_parallel_size)


def answer_evaluation(config: Config, tokenizer: Tokenizer) -> AnswerEvaluation | None:
    """Of a run whose held-out data are prompts; None where ``config`` asks for none."""
    if config.evaluation.eval_interval is None:
        return None
    return AnswerEvaluation(config, tokenizer, heldout_prompts(config, tokenizer))


def heldout_prompts(config: Config, tokenizer: Tokenizer) -> list[Prompt]:
    """The first ``eval_examples`` prompts of the held-out data. Raises UserError."""
    data, evaluation = config.data, config.evaluation
    longest, skipped = config.model.max_position_embeddings, Tally() if data.bad_rows == "skip" else None
    path, split = evaluation.eval_data_path, evaluation.eval_split
    prompts = read_prompts(path, tokenizer, longest, data.apply_chat_template, split, skipped)
    found = prompts[: evaluation.eval_examples]
    if missing := next((prompt for prompt in found if prompt.row.get("answer") is None), None):
        raise UserError(f"eval_data_path: {missing.location}: the row has no 'answer' to compare with")
    return found


class AnswerEvaluation:
    """Exact match of decoded answers to held-out ``problems``."""

    def __init__(self, config: Config, tokenizer: Tokenizer, problems: list[Prompt]):
        self.config, self.tokenizer, self.problems = config, tokenizer, problems
        self.verifier = load_verifier(config.evaluation.eval_verifier)

    def remarks(self) -> list[str]:
        """Lines that the owner of the held-out data should read."""
        return []

    def remember_reference(self, engine: Engine) -> None:
        """Computes what the run's reference thinks of the held-out data; collective."""

    def measure(self, engine: Engine) -> dict[str, float]:
        """``eval/...`` metrics of the policy, the same on every process; collective."""
        with engine.for_evaluation():
            metrics = self._measure(engine)
        return {f"eval/{name}": value for name, value in metrics.items()}

    def _measure(self, engine: Engine) -> dict[str, float]:
        return self._decoded(engine)

    def _decoded(self, engine: Engine) -> dict[str, float]:
        """Share of problems whose greedily decoded answer the verifier accepts, and what decoding cost."""
        settings, block_size = self.config.evaluation, self.config.model.block_size
        rule, longest = family_of(self.config.model).rule, settings.eval_max_new_tokens
        options = DecodingOptions(
            max_new_tokens=longest,
            rule=rule,
            threshold=settings.eval_threshold,
            small_block_size=default_small_block(block_size, rule, longest),
        )
        decoded = decode_prompts(
            engine, self.problems, options, batch_size=settings.eval_batch_size, seed=0, progress=False
        )
        judge = Judge(self.verifier)
        right = 0
        for problem, samples in zip(self.problems, decoded, strict=True):
            text = self.tokenizer.decode(samples[0].answer)
            right += judge(problem.row, problem.location, text) is True
        if len(judge.failures) == len(self.problems):
            raise UserError(f"eval_verifier judged no answer: {judge.failures[0]}")
        if engine.is_main:
            judge.report("count as wrong")
        return {"exact_match": right / len(self.problems), **efficiency([samples[0] for samples in decoded])}


class PeriodicEvaluation(AnswerEvaluation):
    """Held-out data, opened and checked before training begins."""

    def __init__(self, config: Config, tokenizer: Tokenizer, data_parallel_size: int):
        """Raises UserError for data that cannot be used. Collective."""
        heldout = copy.deepcopy(config)
        heldout.data.data_path = config.evaluation.eval_data_path
        heldout.data.split = config.evaluation.eval_split
        heldout.data.shuffle = False
        super().__init__(heldout, tokenizer, [])
        self.replicas = data_parallel_size
        self.replica = parallel_state.get_data_parallel_rank()
        self.data = open_data(self.config, tokenizer)
        count = min(config.evaluation.eval_examples, len(self.data.order))
        self.indices = [sample.index for sample in self.data.order.take(0, count)]
        self.objective = OBJECTIVES[config.objective.objective](config.objective)
        self.problems = self._problems()
        self.reference: dict[int, tuple[float, float]] = {}

    def _problems(self) -> list[Prompt]:
        """The prompts, token for token those of the examples, of the rows that have an answer."""
        store, problems = self.data.store, []
        for index in self.indices:
            # A row may be several examples, one for each of the assistant's messages: its answer is that of the last.
            if index + 1 < len(store) and store.row_number(index + 1) == store.row_number(index):
                continue
            row, ids = store.row(index), store[index].prompt.tolist()
            if row.get("answer") is not None:
                text = self.tokenizer.decode(ids)
                problems.append(Prompt(row, store.location(index), text, ids, text))
        return problems

    def remarks(self) -> list[str]:
        """Lines that the owner of the held-out data should read."""
        path, count = self.config.data.data_path, len(self.indices)
        silent = (
            [] if self.problems else [f"note: none of the {count} examples of {path} has an answer: nothing is decoded"]
        )
        return [line.replace(": ", ": eval_data_path: ", 1) for line in self.data.remarks(self.config)] + silent

    def remember_reference(self, engine: Engine) -> None:
        """Scores the held-out pairs under the run's reference, where the objective reads one. Collective."""
        if self.objective.reads_reference:
            builder = self.data.reference_batches(self.config, self.replica, self.replicas)
            with engine.for_evaluation():
                self.reference = score_pairs(engine, builder, self.indices)

    def _measure(self, engine: Engine) -> dict[str, float]:
        return self._objective(engine) | (self._decoded(engine) if self.problems else {})

    def _objective(self, engine: Engine) -> dict[str, float]:
        builder = self.data.batches(self.config, self.replica, self.replicas)
        names = self.objective.metric_names
        outcomes = []
        for start in range(0, len(self.indices), CHUNK):
            objects.stop_together()
            samples = [Sample(0, index) for index in self.indices[start : start + CHUNK]]
            batches = engine.to_device(builder.batches(samples))
            for batch in batches:
                if self.reference:
                    known = np.array([self.reference[sample.index] for sample in batch.samples])
                    batch.given = to_device(torch.from_numpy(known).flatten(), engine.device)
            outcomes += engine.evaluate(batches, self.objective)
        sums, count, *_ = reduce_metrics(outcomes, len(names), 0, False, engine.device)
        return {name: value / max(float(count), 1) for name, value in zip(names, sums.tolist(), strict=True)}
