"""The pairs that a benchmark runs, as token ids, the same for all contenders."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from examples import arithmetic
from megatron_dtrpo.data.rows import open_rows
from megatron_dtrpo.errors import UserError

END = "<|im_end|>"
TOKENIZER_TEXTS = 4000  # rows a tokenizer is trained on, at most


class Pair(NamedTuple):
    """``index``: of the row, which seeds its noise; ``prompt, chosen, rejected``: int64 ``[P]``, ``[R]`` each, the end
    token included."""

    index: int
    prompt: Tensor
    chosen: Tensor
    rejected: Tensor

    @property
    def responses(self) -> tuple[Tensor, Tensor]:
        return self.chosen, self.rejected


def arithmetic_rows(count: int, seed: int = 0) -> list[dict]:
    """Pairs of the quickstart's task: a right solution and the careless pupil's."""
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        numbers = tuple(rng.choice(choices) for choices in arithmetic.RANGES)
        right, careless = arithmetic.record(numbers), arithmetic.record(numbers, rng)
        if right["completion"] != careless["completion"]:
            rows.append({"prompt": right["prompt"], "chosen": right["completion"], "rejected": careless["completion"]})
    return rows


def preference_rows(path: Path) -> list[dict]:
    """All rows of a preference file. Raises UserError where one is not three texts."""
    rows = open_rows(path)
    found = [dict(row) for row in rows]
    for number, row in enumerate(found):
        for key in ("prompt", "chosen", "rejected"):
            if not isinstance(row.get(key), str) or not row[key]:
                raise UserError(f"{rows.location(number)}: {key} must be a text, for the benchmark")
    return found


def train_tokenizer(rows: Iterable[dict], vocabulary: int):
    """A byte-level BPE of at most ``vocabulary`` tokens on the rows' own texts. Where no tokenizer is given, texts get
    about the lengths that a real one would give them; speed depends on nothing else of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (row[key] for row in itertools.islice(rows, TOKENIZER_TEXTS) for key in ("prompt", "chosen", "rejected"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def tokenize(rows: list[dict], chosen: Iterable[int], tokenizer, vocabulary: int) -> list[Pair]:
    """The rows numbered ``chosen``. Ids beyond ``vocabulary`` (of a tokenizer larger than the model) are folded into
    it: weights are random and only lengths matter."""
    end = tokenizer.eos_token_id

    def ids(text: str, ends: bool) -> Tensor:
        found = tokenizer(text, add_special_tokens=False)["input_ids"] + [end] * ends
        return torch.tensor(found) % vocabulary

    return [
        Pair(i, ids(rows[i]["prompt"], False), ids(rows[i]["chosen"], True), ids(rows[i]["rejected"], True))
        for i in chosen
    ]
