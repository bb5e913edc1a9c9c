"""Autoregressive DPO by TRL's own `DPOTrainer`: its collator, its loss, its training step."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence

import torch

from tools.benchmarks.peers.pairs import Pair
from tools.benchmarks.peers.weights import Learner


class TrlDpo:
    """One full preference step per call of `step`. Needs the package ``trl``."""

    def __init__(self, learner: Learner, tokenizer, *, beta: float, micro_batch_size: int):
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        self.learner, self.micro_batch_size = learner, micro_batch_size
        self.folder = tempfile.TemporaryDirectory(prefix="trl-")  # goes with this object
        config = DPOConfig(
            output_dir=self.folder.name,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            beta=beta,
            learning_rate=learner.lr,
            per_device_train_batch_size=micro_batch_size,
            max_length=None,
            report_to=[],
            disable_tqdm=True,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
        )
        row = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}  # pairs are given as tokens; the trainer wants a set
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer = DPOTrainer(
                model=learner.policy,
                ref_model=learner.reference,
                args=config,
                train_dataset=Dataset.from_list([row] * micro_batch_size),
                processing_class=tokenizer,
            )
        self.tokens = 0

    def step(self, pairs: Sequence[Pair]) -> float:
        """The mean loss of ``pairs``, and one update."""
        self.learner.optimizer.zero_grad()
        self.tokens, total = 0, 0.0
        batches = [pairs[i : i + self.micro_batch_size] for i in range(0, len(pairs), self.micro_batch_size)]
        for some in batches:
            inputs = self.trainer.data_collator(
                [
                    {
                        "prompt_ids": p.prompt.tolist(),
                        "chosen_ids": p.chosen.tolist(),
                        "rejected_ids": p.rejected.tolist(),
                    }
                    for p in some
                ]
            )
            self.tokens += inputs["input_ids"].numel()
            # What the trainer divides a micro-batch's mean by; the last one may be short.
            self.trainer.current_gradient_accumulation_steps = len(pairs) / len(some)
            loss = self.trainer.training_step(self.learner.policy, inputs)
            total += float(loss)
        self.learner.update()
        return total
