"""What every run has, whatever it trains on: its model, reference, log and checkpoints, and how it starts and ends.

A run of its own is a subclass with two methods, as `training.trainer.Trainer` and `online.loop.OnlineTrainer`:
`remarks` says what the owner of the data should read, and `_train` goes through the iterations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_dtrpo.checkpoint import distributed as checkpoint
from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.checkpoint import iterations
from megatron_dtrpo.config.notes import notes
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import SharedError, StopRequest
from megatron_dtrpo.model.lora import without_adapters
from megatron_dtrpo.objectives.objective import Objective, Outcome
from megatron_dtrpo.runtime import initialize, objects, stop
from megatron_dtrpo.training import resume
from megatron_dtrpo.training.device_batch import DeviceBatch
from megatron_dtrpo.training.engine import Engine
from megatron_dtrpo.training.metric_log import MetricLog
from megatron_dtrpo.training.passes import reduce_metrics
from megatron_dtrpo.training.reference import (
    ReferencePolicy,
    check_patterns,
    select_trainable,
)
from megatron_dtrpo.training.run_folder import write_run_folder

# A gradient that enters the logits with less than this per example may be lost to rounding in the norm's squares.
_NO_SLOPE = 1e-8


@dataclass(frozen=True)
class Update:
    """One step of the optimizer: sums of the metrics and their divisor over the global batch, packed ``tokens``,
    whether some process was asked to stop; the gradient's norm and the learning rate; the outcomes of this process's
    micro-batches."""

    sums: dict[str, float]
    count: float
    tokens: float
    stopping: bool
    grad_norm: float
    lr: float
    outcomes: list[Outcome]

    def means(self) -> dict[str, float]:
        return {name: value / max(self.count, 1) for name, value in self.sums.items()}


class Run:
    """One run, and `run` to make it.

    Attributes:
        iteration, consumed: how far it is, in iterations and in samples of the data.
        train_iters: where it ends.
    """

    unit = "steps"

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        objective: Objective,
        *,
        train_iters: int,
        data_record: dict,
        evaluation=None,
        updates: int = 1,
    ):
        """``updates``: optimizer steps of an iteration at most. ``data_record``: of `resume.data_record`.
        ``evaluation``: of `evaluation.periodic`, or None."""
        self.config, self.evaluation, self.objective = config, evaluation, objective
        self.is_main = initialize.rank() == 0
        self.train_iters, self.updates, self.data_record = train_iters, updates, data_record
        self._build(tokenizer)

    def _build(self, tokenizer: Tokenizer) -> None:
        config, run = self.config, self.config.run
        resume_from = iterations.latest_iteration(run.save)
        if resume_from is not None:
            saved = checkpoint_folder.load_model_config(run.save)
            go_on = "to go on with this run give {name} {value}"
            checkpoint_folder.check_same_architecture(config.model, saved, run.save, go_on)

        first_adapter = run.load_adapter if resume_from is None else None  # a resumed run has its own
        self.engine = Engine.starting(config, tokenizer, first_adapter)
        self._freeze()
        self.reference = self._open_reference(tokenizer) if self.objective.reads_reference else None
        self.engine.prepare_training(self.train_iters * self.updates)

        self.iteration = self.consumed = 0
        self.saved_at = resume_from
        self.sources = resume.source_iterations(run)
        if resume_from is not None:
            progress = self.engine.resume(run.save, resume_from)
            resume.check_data(run.save, progress, self.data_record)
            self._go_on_from(progress)
        self._check_progress()
        changes = []
        if self.is_main:
            changes = write_run_folder(config, tokenizer, self.engine.base)
        self.log = MetricLog(run, self.iteration, self.train_iters, config.to_flat()) if self.is_main else None
        self.writer = checkpoint.Writer(run, self._say)
        self._announce(resume_from, changes)
        if self.is_main and (note := tokenizer.note_on_end()):
            self.log.say(f"warning: {note}")

    def _go_on_from(self, progress: dict) -> None:
        """Takes the `_progress` of a checkpoint."""
        self.iteration, self.consumed = progress["iteration"], progress["consumed_samples"]

    def _progress(self) -> dict:
        """What a checkpoint says of how far the run is."""
        return {"iteration": self.iteration, "consumed_samples": self.consumed}

    def _check_progress(self) -> None:
        """Raises UserError where the run cannot go on from here."""

    def _open_reference(self, tokenizer: Tokenizer) -> ReferencePolicy | None:
        """Computes with the reference what is computed once, and keeps what every step needs of it."""
        own = self.config.run.reference is not None
        engine = Engine.of_reference(self.config, tokenizer) if own else self.engine
        if self.evaluation is not None:
            with without_adapters(engine.chunks):
                self.evaluation.remember_reference(engine)
        return self._keep_reference(engine, own)

    def _keep_reference(self, engine, own: bool) -> ReferencePolicy | None:
        """``own``: ``engine`` is the reference's own, and not the policy's at its starting point."""
        return ReferencePolicy(self.engine.chunks, engine.chunks if own else None)

    def _freeze(self) -> None:
        patterns = self.config.objective.trainable_modules
        matched = objects.gather(select_trainable(self.engine.chunks, patterns))
        check_patterns(patterns, set().union(*matched))

    def _announce(self, resume_from: int | None, changes: list[str]) -> None:
        if not self.is_main:
            return
        origin = f"resuming from iteration {resume_from}" if resume_from is not None else "starting"
        self.log.say(f"{origin}: {self.data_record['usable_examples']} examples, {self.train_iters} {self.unit}")
        if changes and resume_from is not None:
            self.log.say(f"changed since this run's last start: {', '.join(changes)}")
        if self.iteration >= self.train_iters:
            way_on = "a larger --train-iters or --num-epochs goes on"
            self.log.say(f"nothing to do: iteration {self.iteration} is reached; {way_on}")
        for line in [*notes(self.config), *self.remarks()]:
            self.log.say(line)

    def remarks(self) -> list[str]:
        """Lines about the data."""
        raise NotImplementedError

    def _train(self) -> None:
        """Goes on to the last iteration. Raises StopRequest on every process if one was asked to stop."""
        raise NotImplementedError

    def run(self) -> None:
        """Trains to the last step, or until some process is asked to stop, and saves."""
        try:
            self._train()
            if self.saved_at != self.iteration:
                self._save()
            self.writer.finish()
        except StopRequest as request:
            self._stop(request)
        except KeyboardInterrupt:
            self._say(f"interrupted after iteration {self.iteration}: {self._kept()}; SIGTERM saves first")
            raise
        finally:
            if self.log is not None:
                self.log.close()
        if self.log is not None:
            self.log.finish()

    def _after_iteration(self, stopping: bool) -> None:
        """What may follow every iteration: the end, an evaluation, a checkpoint."""
        self.writer.finish(wait=False)
        if stopping:
            objects.stop_together()
        if self._is_evaluated():
            self._evaluate()
        if self.iteration % self.config.run.save_interval == 0:
            self._save()

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

    def _update(self, batches: list[DeviceBatch], packed: int) -> Update:
        """Gradients of this process's ``batches``, of ``packed`` tokens, and a step of the optimizer; collective.

        Raises:
            SharedError: the loss or the gradient is not finite, or nothing that is trained has a part in the loss.
        """
        outcomes = self.engine.train_pass(batches, self.objective)
        names = self.objective.metric_names
        reduced = reduce_metrics(outcomes, len(names), packed, stop.requested() is not None, self.engine.device)
        sums: list[float] = reduced.metrics.tolist()
        count, tokens, stopping, slope = (float(t) for t in reduced[1:])
        samples = [sample for batch in batches for sample in batch.samples]
        loss = sums[0] / max(count, 1)
        if not math.isfinite(loss):
            self._fail("loss", loss, samples, outcomes)
        lr = self.engine.learning_rate()
        grad_norm = self.engine.update()
        if grad_norm is not None and not math.isfinite(grad_norm):
            self._fail("gradient norm", grad_norm, samples, outcomes)
        if grad_norm == 0 and slope > _NO_SLOPE * max(count, 1):
            self._fail_without_gradient()
        self.engine.scheduler.step(increment=1)
        named = dict(zip(names, sums, strict=True))
        return Update(named, count, tokens, stopping > 0, float(grad_norm or 0.0), lr, outcomes)

    def _place(self, index: int) -> str:
        """Where example ``index`` of the data stands."""
        raise NotImplementedError

    def _fail(self, what: str, value: float, samples: list[Sample], outcomes: list[Outcome]) -> None:
        """Names the examples whose own loss is not finite or, where all are, every example of the step. Collective:
        all processes see the same reduced number."""
        culprits = []
        if outcomes:
            finite = torch.cat([o.per_example for o in outcomes]).isfinite().tolist()
            culprits = [sample for sample, ok in zip(samples, finite, strict=True) if not ok]
        gathered = objects.gather((culprits, samples))
        named = {s.index for mine, _ in gathered for s in mine} or {s.index for _, all_ in gathered for s in all_}
        places = ", ".join(self._place(index) for index in sorted(named))
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
        return self._kept()

    def _kept(self) -> str:
        last = iterations.latest_iteration(self.config.run.save)
        return f"the checkpoint of iteration {last} is kept" if last is not None else "no checkpoint was written yet"

    def _save(self) -> None:
        self.engine.save(self.writer, self.iteration, self._progress() | self.data_record | self.sources)
        self.saved_at = self.iteration

    def _say(self, message: str) -> None:
        if self.log is not None:
            self.log.say(message)
