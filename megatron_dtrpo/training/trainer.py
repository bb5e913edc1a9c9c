"""Training on a file of examples: preference pairs, or supervised fine-tuning."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from megatron.core import parallel_state
from torch import Tensor

from megatron_dtrpo.checkpoint.fingerprint import weights_fingerprint
from megatron_dtrpo.config.backends import BACKENDS
from megatron_dtrpo.config.estimators import ESTIMATORS
from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.data.micro_batch import MicroBatch
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.runtime import objects
from megatron_dtrpo.runtime.compiler import compilations
from megatron_dtrpo.training import resume
from megatron_dtrpo.training.device_batch import DeviceBatch, HostBatch
from megatron_dtrpo.training.reference import ReferencePolicy
from megatron_dtrpo.training.reference_cache import ReferenceCache
from megatron_dtrpo.training.run import Run
from megatron_dtrpo.training.setup import Data, open_data


class Trainer(Run):
    """Training on a file of examples: built from a validated configuration, then `run`."""

    def __init__(self, config: Config, tokenizer: Tokenizer, data_parallel_size: int, evaluation=None):
        """``evaluation``: an `evaluation.periodic.PeriodicEvaluation`, or None."""
        self.config = config
        self.data: Data = open_data(config, tokenizer)
        rank = parallel_state.get_data_parallel_rank()
        self.batches = self.data.batches(config, rank, data_parallel_size)
        objective = OBJECTIVES[config.objective.objective](config.objective)
        self.cache = self._open_cache()
        # The reference has batches of its own where it is run, and on other noise than the policy.
        self.reads_reference_live = objective.reads_reference and self.cache is None
        runs_alone = ESTIMATORS[config.objective.estimator].independent_reference and self.reads_reference_live
        self.reference_batches = self.data.reference_batches(config, rank, data_parallel_size) if runs_alone else None
        examples = len(self.data.order)
        super().__init__(
            config,
            tokenizer,
            objective,
            train_iters=config.optimizer.steps(examples, config.data.global_batch_size),
            data_record=resume.data_record(self.data.store.content, tokenizer.fingerprint(), examples),
            evaluation=evaluation,
        )

    def _open_cache(self) -> ReferenceCache | None:
        directory = self.config.run.reference_cache
        if directory is None:
            return None
        cache = ReferenceCache(directory)
        cache.require({"data": self.data.store.content})
        return cache

    def _check_progress(self) -> None:
        if self.cache is not None:
            batch = self.config.data.global_batch_size
            left = (self.train_iters - self.iteration) * batch
            self.cache.require_steps(self.data.order, self.consumed, self.consumed + left, batch)

    def _keep_reference(self, engine, own: bool) -> ReferencePolicy | None:
        if self.cache is None:
            return super()._keep_reference(engine, own)
        self.cache.require({"weights": weights_fingerprint(engine.chunks)})
        return None

    def remarks(self) -> list[str]:
        usable, batch = len(self.data.order), self.config.data.global_batch_size
        heldout = self.evaluation.remarks() if self.evaluation is not None else []
        found = self.data.remarks(self.config) + heldout
        if usable < batch:
            found.append(f"warning: {usable} examples are fewer than global_batch_size {batch}: a step repeats some")
        return found

    def _train(self) -> None:
        # The next step's batches are built while this one computes.
        pool = ThreadPoolExecutor(max_workers=1)
        try:
            self._train_with(pool)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _train_with(self, pool: ThreadPoolExecutor) -> None:
        """Raises StopRequest on every process, at any moment between two steps or within an evaluation."""
        upcoming = pool.submit(self._build_batches, self.consumed)
        objects.stop_together()
        if self._lacks_evaluation():
            self._evaluate()
        while self.iteration < self.train_iters:
            batches, reference_batches = upcoming.result()
            upcoming = pool.submit(self._build_batches, self.consumed + self.config.data.global_batch_size)
            self._after_iteration(self._step(batches, reference_batches))

    def _build_batches(self, consumed: int) -> tuple[list[HostBatch], list[HostBatch] | None]:
        """The policy's batches of the step after ``consumed`` samples, and the reference's where it has its own: the
        same samples in the same places."""
        own = self.reference_batches.step(consumed) if self.reference_batches is not None else None
        return self._prepared(self.batches.step(consumed)), None if own is None else self._prepared(own)

    def _prepared(self, batches: list[MicroBatch]) -> list[HostBatch]:
        return [self.engine.prepare(batch) for batch in batches]

    def _step(self, host_batches: list[HostBatch], reference_batches: list[HostBatch] | None) -> bool:
        """One optimizer step. Returns whether some process was asked to stop before it ended."""
        started = time.perf_counter()
        packed = sum(batch.tokens for batch in host_batches)
        batches = self.engine.to_device(host_batches)
        scores = self._reference_scores(batches, reference_batches)
        for batch, reference in zip(batches, scores, strict=False):  # no scores but on the last stage
            batch.given = reference

        done = self._update(batches, packed)
        self.iteration += 1
        self.consumed += self.config.data.global_batch_size
        if self.log is not None:
            seconds = time.perf_counter() - started
            compiled = {"compilations": compilations()} if BACKENDS[self.engine.backend].compiles else {}
            self.log.step(
                {
                    "iteration": self.iteration,
                    "consumed_samples": self.consumed,
                    **done.means(),
                    "grad_norm": done.grad_norm,
                    "lr": done.lr,
                    "pairs_per_second": self.config.data.global_batch_size / seconds,
                    "tokens_per_second": done.tokens / seconds,
                    **compiled,
                }
            )
        return done.stopping

    def _reference_scores(self, batches: list[DeviceBatch], own: list[HostBatch] | None) -> list[Tensor]:
        """``L`` per response under the reference, ``[responses]`` for each of ``batches``, at least on the last stage;
        an empty list where the objective has no reference."""
        if self.cache is not None:
            return [self.cache.scores(batch.samples, self.engine.device) for batch in batches]
        if self.reference is None:
            return []
        with self.reference.in_place_of_policy(), self.engine.as_reference():
            return self.engine.score(batches if own is None else own)

    def _place(self, index: int) -> str:
        return self.data.store.location(index)
