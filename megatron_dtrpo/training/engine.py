"""The one object between data and loops: a model on this process's device, and every kind of pass over it.

    engine = Engine.new(config, tokenizer)            # the weights that the seed gives, or
    engine = Engine.load(folder, iteration, ...)      # ... those of a checkpoint
    engine.score(batches)                             # L of every response
    engine.decoder().decode(prompts, options, ...)    # responses
    engine.prepare_training(steps)                    # gradients and an optimizer, and then
    engine.train_pass(batches, objective)             # ... gradients of the objective
    engine.update()                                   # ... a step of the optimizer

Trainer, periodic evaluation, scoring, the reference cache and likelihoods are pages on top of it: none of them knows
the device, the attention backend, or how a packed sequence is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_dtrpo.checkpoint import distributed as checkpoint
from megatron_dtrpo.checkpoint.adapter import AdapterRecord
from megatron_dtrpo.checkpoint.fingerprint import base_fingerprint
from megatron_dtrpo.checkpoint.iterations import require_latest
from megatron_dtrpo.config.backends import choose_backend
from megatron_dtrpo.config.fp8 import token_multiple
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.data.micro_batch import MicroBatch
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.inference.decoder import BlockDecoder, make_decoder
from megatron_dtrpo.model.attention import attention_width
from megatron_dtrpo.model.gpt import BlockDiffusionModel
from megatron_dtrpo.model.initialization import initialize_weights
from megatron_dtrpo.model.lora import add_adapters, initialize_adapters, with_dropout, without_adapters
from megatron_dtrpo.model.provider import build_chunks
from megatron_dtrpo.objectives.objective import Objective, Outcome
from megatron_dtrpo.objectives.targets import Targets
from megatron_dtrpo.runtime import initialize, objects
from megatron_dtrpo.runtime.fp8 import reference_pass, without_fp8
from megatron_dtrpo.training import passes, resume
from megatron_dtrpo.training.device_batch import DeviceBatch, HostBatch, prepare
from megatron_dtrpo.training.optimizer import (
    build_optimizer,
    build_scheduler,
    finish_parameter_gather,
    wrap_data_parallel,
)

Batch = MicroBatch | HostBatch | DeviceBatch


class Engine:
    """This process's stages of a model. Every process of the run makes one, and calls it with its own batches.

    Attributes:
        chunks: the bare stages, one or, under interleaving, several virtual ones.
        replica, replicas: the data-parallel process that this is, of how many.
        optimizer, scheduler: after `prepare_training`.
        base: where the stages have adapters, the fingerprint of the weights beside which they stand.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, chunks: Sequence[BlockDiffusionModel]):
        """``config``: validated. ``chunks``: on this process's device."""
        self.config, self.tokenizer, self.chunks = config, tokenizer, list(chunks)
        self.device = initialize.device()
        self.backend = choose_backend(config.parallel.attention_backend, self.device.type)
        self.replica = parallel_state.get_data_parallel_rank()
        self.replicas = parallel_state.get_data_parallel_world_size()
        self.optimizer: Any = None
        self.scheduler: Any = None
        self._wrapped: list = self.chunks  # as passes call them
        self.base: str | None = None
        self._width = attention_width(self.chunks[0].config)
        self._multiple = token_multiple(config.parallel)
        self._dropout_seed: int | None = None  # nothing drops out before `prepare_training`

    @classmethod
    def new(cls, config: Config, tokenizer: Tokenizer) -> Engine:
        """With the weights that the seed gives."""
        engine = cls._empty(config, tokenizer)
        for chunk in engine.chunks:
            initialize_weights(chunk, config.optimizer.seed)
        return engine

    @classmethod
    def load(cls, folder: str | Path, iteration: int, config: Config, tokenizer: Tokenizer) -> Engine:
        """With the weights of a checkpoint, under any layout; collective."""
        engine = cls._empty(config, tokenizer)
        engine.load_weights(folder, iteration)
        return engine

    @classmethod
    def starting(cls, config: Config, tokenizer: Tokenizer, adapter: str | None = None) -> Engine:
        """With the weights that a run starts from, ``load``'s or the seed's, and adapters where it trains them: those
        in the folder ``adapter``, or new ones. Collective."""
        engine = cls._of_base(config, tokenizer)
        if config.lora.lora_rank is not None:
            engine.add_adapters(adapter)
        return engine

    @classmethod
    def of_reference(cls, config: Config, tokenizer: Tokenizer) -> Engine:
        """With those of a run's reference, ``reference`` or else what the run starts from, without an adapter;
        collective."""
        if config.run.reference is None:
            return cls._of_base(config, tokenizer)
        return cls._of(config, tokenizer, "reference")

    @classmethod
    def _of_base(cls, config: Config, tokenizer: Tokenizer) -> Engine:
        return cls.new(config, tokenizer) if config.run.load is None else cls._of(config, tokenizer, "load")

    @classmethod
    def _of(cls, config: Config, tokenizer: Tokenizer, key: str) -> Engine:
        return cls.load(getattr(config.run, key), resume.source_iteration(config.run, key), config, tokenizer)

    @classmethod
    def _empty(cls, config: Config, tokenizer: Tokenizer) -> Engine:
        device = initialize.device()
        chunks = [chunk.to(device) for chunk in build_chunks(config.model, config.parallel)]
        return cls(config, tokenizer, chunks)

    def add_adapters(self, folder: str | Path | None = None) -> None:
        """Freezes the weights and puts adapters beside them, as the settings say: those in ``folder``, or new ones.
        Collective. Raises UserError where they belong to other weights."""
        self.base = base_fingerprint(self.chunks)
        add_adapters(self.chunks, self.config.lora)
        if folder is None:
            initialize_adapters(self.chunks, self.config.optimizer.seed)
        else:
            AdapterRecord.read(folder).require_base(folder, self.base, self.config.run.load)
            checkpoint.load(folder, require_latest(folder), self.chunks, adapters=True)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return dist.get_rank() == 0

    # Batches

    def prepare(self, batch: MicroBatch) -> HostBatch:
        """All that a batch needs before it is copied to the device; on any thread."""
        return prepare(batch, self.device, self.backend, self._multiple, self._dropout_seed)

    def to_device(self, batches: Iterable[Batch]) -> list[DeviceBatch]:
        """Copies what is not there yet."""
        return [batch if isinstance(batch, DeviceBatch) else self._copied(batch) for batch in batches]

    def _copied(self, batch: MicroBatch | HostBatch) -> DeviceBatch:
        host = batch if isinstance(batch, HostBatch) else self.prepare(batch)
        return DeviceBatch(host, self.device, self.backend, self._width, self._multiple)

    # Passes. All processes of a pipeline make the same ones, with as many batches.

    def score(self, batches: Iterable[Batch]) -> list[Tensor]:
        """``L`` per response, fp64 ``[responses]`` for each batch, on the last stage; an empty list on the others."""
        on_device = self.to_device(batches)
        return passes.score(self._wrapped, on_device) if on_device else []

    def log_probs(self, batches: Iterable[Batch]) -> list[Tensor]:
        """The log-probabilities ``[N]`` of the targets that this process predicts for each batch, as `score`."""
        on_device = self.to_device(batches)
        return passes.log_probs(self._wrapped, on_device) if on_device else []

    def measure(self, batches: Iterable[Batch], of: Callable[[Targets, Any], Tensor]) -> list[Tensor]:
        """``of`` the targets and what is given of every batch, as `score`."""
        on_device = self.to_device(batches)
        return passes.measure(self._wrapped, on_device, of) if on_device else []

    def train_pass(self, batches: Iterable[Batch], objective: Objective) -> list[Outcome]:
        """Gradients of the objective over ``batches``; their outcomes on the last stage, ``[]`` on the others."""
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        with with_dropout(self.chunks):
            return passes.train_pass(self._wrapped, self.to_device(batches), objective)

    def evaluate(self, batches: Iterable[Batch], objective: Objective) -> list[Outcome]:
        """As `train_pass`, without gradients."""
        on_device = self.to_device(batches)
        if not on_device:
            return []
        with torch.no_grad():
            return passes.train_pass(self._wrapped, on_device, objective, forward_only=True)

    def decoder(self, end_ids: Iterable[int] = ()) -> BlockDecoder:
        """Stops at the tokenizer's end token and at ``end_ids``."""
        backend = self.config.parallel.attention_backend
        return make_decoder(self.chunks, self.config.model, self.tokenizer, end_ids, backend)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, passes are the reference's: without adapters, without gradient, in FP8 or not as ``fp8_reference``
        says."""
        in_fp8 = self.config.parallel.fp8_reference
        with torch.no_grad(), without_adapters(self.chunks), reference_pass(self.chunks, in_fp8):
            yield

    @contextmanager
    def for_evaluation(self) -> Iterator[None]:
        """Inside, weights are up to date and passes of any length: without FP8, whose products ask for multiples."""
        self.finish_update()
        with without_fp8(self.chunks):
            yield

    def joined(self, found: dict) -> dict:
        """What any process ``found``, on every process; collective. Those that found the same key have the same
        value."""
        # Tensor- and context-parallel processes hold the same: one of them speaks.
        speaks = parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_context_parallel_rank() == 0
        return {key: value for part in objects.gather(found if speaks else {}) for key, value in part.items()}

    # Training

    def prepare_training(self, train_iters: int) -> None:
        """Makes what gradients and updates of a run of so many steps need; frozen parameters are frozen before."""
        self._wrapped = wrap_data_parallel(self.chunks, self.config)
        self.optimizer = build_optimizer(self._wrapped, self.config)
        self.scheduler = build_scheduler(self.optimizer, self.config, train_iters)
        if self.config.lora.lora_dropout > 0:
            self._dropout_seed = self.config.optimizer.seed

    def update(self) -> float | None:
        """One step of the optimizer; returns the gradient's norm. The scheduler is the caller's to step."""
        _, norm, _ = self.optimizer.step()
        return norm

    def finish_update(self) -> None:
        """Brings all weights up to date on every process; what reads them between two steps calls it. Collective."""
        if self.optimizer is not None:
            finish_parameter_gather(self._wrapped)

    def learning_rate(self) -> float:
        return next(g["lr"] for g in self.optimizer.param_groups if g.get("default_config", True))

    # Checkpoints

    def load_weights(self, folder: str | Path, iteration: int) -> None:
        """Takes the weights of a checkpoint, and leaves adapters as they are; collective."""
        checkpoint.load(folder, iteration, self.chunks)

    def resume(self, folder: str | Path, iteration: int) -> dict:
        """Takes weights, or the adapters where there are any, optimizer and scheduler, and returns the run's progress;
        collective."""
        adapters = self.base is not None
        if adapters:
            AdapterRecord.read(folder).require_base(folder, self.base, self.config.run.load)
        progress = checkpoint.load(folder, iteration, self.chunks, self.optimizer, self.scheduler, adapters)
        self.scheduler.step(increment=0)
        return progress

    def save(self, writer: checkpoint.Writer, iteration: int, progress: dict) -> None:
        """Writes a checkpoint that `resume` continues from; collective."""
        self.finish_update()
        writer.save(iteration, self.chunks, self.optimizer, self.scheduler, progress)
