"""The training loop."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_dtrpo.checkpoint import distributed as checkpoint
from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.checkpoint import iterations
from megatron_dtrpo.checkpoint.fingerprint import weights_fingerprint
from megatron_dtrpo.config.backends import BACKENDS
from megatron_dtrpo.config.estimators import ESTIMATORS
from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.rules import validate_decoding
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.data.micro_batch import MicroBatch, Sample
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import SharedError, StopRequest
from megatron_dtrpo.objectives.objective import Outcome
from megatron_dtrpo.runtime import initialize, objects, stop
from megatron_dtrpo.runtime.compiler import compilations
from megatron_dtrpo.training import resume
from megatron_dtrpo.training.device_batch import DeviceBatch, HostBatch
from megatron_dtrpo.training.metric_log import MetricLog
from megatron_dtrpo.training.passes import reduce_metrics
from megatron_dtrpo.training.reference import (
    ReferencePolicy,
    check_patterns,
    reference_engine,
    select_trainable,
    starting_engine,
)
from megatron_dtrpo.training.reference_cache import ReferenceCache
from megatron_dtrpo.training.setup import Data, open_data, write_run_folder

# A gradient that enters the logits with less than this per example may be lost to rounding in the norm's squares.
_NO_SLOPE = 1e-8


class Trainer:
    """One run: built from a validated configuration, then `run`."""

    def __init__(self, config: Config, tokenizer: Tokenizer, data_parallel_size: int, evaluation=None):
        """``evaluation``: an `evaluation.periodic.PeriodicEvaluation`, or None."""
        self.config, self.evaluation = config, evaluation
        self.is_main = initialize.rank() == 0
        if evaluation is not None and evaluation.problems:
            validate_decoding(config)
        self.data: Data = open_data(config, tokenizer)
        rank = parallel_state.get_data_parallel_rank()
        self.batches = self.data.batches(config, rank, data_parallel_size)
        self.objective = OBJECTIVES[config.objective.objective](config.objective)
        self.train_iters = config.optimizer.steps(len(self.data.order), config.data.global_batch_size)
        self.cache = self._open_cache()
        # The reference has batches of its own where it is run, and on other noise than the policy.
        self.reads_reference_live = self.objective.reads_reference and self.cache is None
        runs_alone = ESTIMATORS[config.objective.estimator].independent_reference and self.reads_reference_live
        self.reference_batches = self.data.reference_batches(config, rank, data_parallel_size) if runs_alone else None
        self._build(tokenizer)

    def _open_cache(self) -> ReferenceCache | None:
        directory = self.config.run.reference_cache
        if directory is None:
            return None
        cache = ReferenceCache(directory)
        cache.require({"data": self.data.store.content})
        return cache

    def _build(self, tokenizer: Tokenizer) -> None:
        config, run = self.config, self.config.run
        resume_from = iterations.latest_iteration(run.save)
        if resume_from is not None:
            saved = checkpoint_folder.load_model_config(run.save)
            checkpoint_folder.check_same_architecture(config.model, saved, run.save)

        self.engine = starting_engine(config, tokenizer)
        self._freeze()
        self.reference = self._open_reference(tokenizer) if self.objective.reads_reference else None
        self.engine.prepare_training(self.train_iters)

        self.iteration = self.consumed = 0
        self.saved_at = resume_from
        self.sources = resume.source_iterations(run)
        self.data_record = resume.data_record(self.data.store.content, tokenizer.fingerprint(), len(self.data.order))
        if resume_from is not None:
            progress = self.engine.resume(run.save, resume_from)
            resume.check_data(run.save, progress, self.data_record)
            self.iteration, self.consumed = progress["iteration"], progress["consumed_samples"]
        if self.cache is not None:
            batch = config.data.global_batch_size
            left = (self.train_iters - self.iteration) * batch
            self.cache.require_steps(self.data.order, self.consumed, self.consumed + left, batch)
        changes = []
        if self.is_main:
            changes = write_run_folder(config, tokenizer)
        self.log = MetricLog(run, self.iteration, self.train_iters, config.to_flat()) if self.is_main else None
        self.writer = checkpoint.Writer(run, self._say)
        self._announce(resume_from, changes)
        if self.is_main and (note := tokenizer.note_on_end()):
            self.log.say(f"warning: {note}")

    def _open_reference(self, tokenizer: Tokenizer) -> ReferencePolicy | None:
        """Computes with the reference what is computed once, and keeps what every step needs of it."""
        own = self.config.run.reference is not None
        engine = reference_engine(self.config, tokenizer) if own else self.engine
        if self.evaluation is not None:
            self.evaluation.remember_reference(engine)
        if self.cache is not None:
            self.cache.require({"weights": weights_fingerprint(engine.chunks)})
            return None
        return ReferencePolicy(self.engine.chunks, engine.chunks if own else None)

    def _freeze(self) -> None:
        patterns = self.config.objective.trainable_modules
        matched = objects.gather(select_trainable(self.engine.chunks, patterns))
        check_patterns(patterns, set().union(*matched))

    def _announce(self, resume_from: int | None, changes: list[str]) -> None:
        if not self.is_main:
            return
        origin = f"resuming from iteration {resume_from}" if resume_from is not None else "starting"
        self.log.say(f"{origin}: {len(self.data.order)} examples, {self.train_iters} steps")
        if changes and resume_from is not None:
            self.log.say(f"changed since this run's last start: {', '.join(changes)}")
        if self.iteration >= self.train_iters:
            self.log.say(f"nothing to do: iteration {self.iteration} is reached; raise --train-iters to go on")
        usable, batch = len(self.data.order), self.config.data.global_batch_size
        heldout = self.evaluation.remarks() if self.evaluation is not None else []
        for line in self.data.remarks(self.config) + heldout:
            self.log.say(line)
        if usable < batch:
            self.log.say(f"warning: {usable} examples are fewer than global_batch_size {batch}: a step repeats some")

    def run(self) -> None:
        """Trains to the last step, or until some process is asked to stop, and saves."""
        # The next step's batches are built while this one computes.
        pool = ThreadPoolExecutor(max_workers=1)
        try:
            self._train(pool)
        except StopRequest as request:
            self._stop(request)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if self.log is not None:
                self.log.close()
        if self.log is not None:
            self.log.finish()

    def _train(self, pool: ThreadPoolExecutor) -> None:
        """Raises StopRequest on every process, at any moment between two steps or within an evaluation."""
        upcoming = pool.submit(self._build_batches, self.consumed)
        objects.stop_together()
        if self._lacks_evaluation():
            self._evaluate()
        while self.iteration < self.train_iters:
            batches, reference_batches = upcoming.result()
            upcoming = pool.submit(self._build_batches, self.consumed + self.config.data.global_batch_size)
            stopping = self._step(batches, reference_batches)
            self.writer.finish(wait=False)
            if stopping:
                objects.stop_together()
            if self._is_evaluated():
                self._evaluate()
            if self.iteration % self.config.run.save_interval == 0:
                self._save()
        if self.saved_at != self.iteration:
            self._save()
        self.writer.finish()

    def _stop(self, request: StopRequest) -> None:
        """Keeps every step that was made."""
        if self.iteration > 0 and self.saved_at != self.iteration:
            self._save()
        self.writer.finish()
        last = f"after iteration {self.iteration}; the checkpoint is complete"
        first = "before the first step; start the same command again"
        self._say(f"stopped by {request} {last if self.iteration > 0 else first}")

    def _is_evaluated(self) -> bool:
        """Whether there is an evaluation after the present iteration."""
        interval = self.config.evaluation.eval_interval
        return interval is not None and (self.iteration % interval == 0 or self.iteration == self.train_iters)

    def _lacks_evaluation(self) -> bool:
        """Whether the evaluation after the iteration that the run starts at is not done: before the first step, or
        where a request to stop came in the middle of it; collective."""
        done = self.log is not None and self.log.has_evaluation(self.iteration)
        return self._is_evaluated() and not objects.broadcast(done)

    def _evaluate(self) -> None:
        if self.evaluation is None:
            return
        metrics = self.evaluation.measure(self.engine)
        if self.log is not None:
            self.log.evaluation({"iteration": self.iteration, **metrics})

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
        samples = [batch.samples for batch in host_batches]
        packed = sum(batch.tokens for batch in host_batches)
        batches = self.engine.to_device(host_batches)
        scores = self._reference_scores(batches, reference_batches)
        for batch, reference in zip(batches, scores, strict=False):  # no scores but on the last stage
            batch.reference = reference

        outcomes = self.engine.train_pass(batches, self.objective)
        names = self.objective.metric_names
        reduced = reduce_metrics(outcomes, len(names), packed, stop.requested() is not None, self.engine.device)
        sums: list[float] = reduced.metrics.tolist()
        count, tokens, stopping, slope = (float(t) for t in reduced[1:])
        metrics = {name: value / max(count, 1) for name, value in zip(names, sums, strict=True)}
        if not math.isfinite(metrics["loss"]):
            self._fail("loss", metrics["loss"], samples, outcomes)
        lr = self.engine.learning_rate()
        grad_norm = self.engine.update()
        if grad_norm is not None and not math.isfinite(grad_norm):
            self._fail("gradient norm", grad_norm, samples, outcomes)
        if grad_norm == 0 and slope > _NO_SLOPE * max(count, 1):
            self._fail_without_gradient()
        self.engine.scheduler.step(increment=1)

        self.iteration += 1
        self.consumed += self.config.data.global_batch_size
        if self.log is not None:
            seconds = time.perf_counter() - started
            compiled = {"compilations": compilations()} if BACKENDS[self.engine.backend].compiles else {}
            self.log.step(
                {
                    "iteration": self.iteration,
                    "consumed_samples": self.consumed,
                    **metrics,
                    "grad_norm": float(grad_norm or 0.0),
                    "lr": lr,
                    "pairs_per_second": self.config.data.global_batch_size / seconds,
                    "tokens_per_second": tokens / seconds,
                    **compiled,
                }
            )
        return stopping > 0

    def _reference_scores(self, batches: list[DeviceBatch], own: list[HostBatch] | None) -> list[Tensor]:
        """``L`` per response under the reference, ``[responses]`` for each of ``batches``, at least on the last stage;
        an empty list where the objective has no reference."""
        if self.cache is not None:
            return [self.cache.scores(batch.samples, self.engine.device) for batch in batches]
        if self.reference is None:
            return []
        with self.reference.in_place_of_policy(), self.engine.as_reference():
            return self.engine.score(batches if own is None else own)

    def _fail(self, what: str, value: float, samples: list[list[Sample]], outcomes: list[Outcome]) -> None:
        """Names the examples whose own loss is not finite or, where all are, every example of the step. Collective:
        all processes see the same reduced number."""
        flat = [sample for batch in samples for sample in batch]
        culprits = []
        if outcomes:
            finite = torch.cat([o.per_example for o in outcomes]).isfinite().tolist()
            culprits = [sample for sample, ok in zip(flat, finite, strict=True) if not ok]
        gathered = objects.gather((culprits, flat))
        named = {s.index for mine, _ in gathered for s in mine} or {s.index for _, all_ in gathered for s in all_}
        places = ", ".join(self.data.store.location(index) for index in sorted(named))
        raise SharedError(f"{what} is {value} at iteration {self.iteration + 1} on {places}; {self._last_checkpoint()}")

    def _fail_without_gradient(self) -> None:
        """The loss asks for a change, and nothing that is trained has a part in it: the run would train nothing."""
        raise SharedError(
            f"gradient norm is 0 at iteration {self.iteration + 1}: no trained parameter has a part in the loss, and "
            f"the run would train nothing: choose other trainable_modules, or leave recompute_granularity out; "
            f"{self._last_checkpoint()}"
        )

    def _last_checkpoint(self) -> str:
        """What is left of a run that ends here; completes a checkpoint that is being written; collective."""
        self.writer.finish()
        last = iterations.latest_iteration(self.config.run.save)
        return f"the checkpoint of iteration {last} is kept" if last is not None else "no checkpoint was written yet"

    def _save(self) -> None:
        progress = {"iteration": self.iteration, "consumed_samples": self.consumed}
        progress |= self.data_record | self.sources
        self.engine.save(self.writer, self.iteration, progress)
        self.saved_at = self.iteration

    def _say(self, message: str) -> None:
        if self.log is not None:
            self.log.say(message)
