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
from megatron_dtrpo.errors import UserError, one_line

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
    """All rows of a preference file as texts. Raises UserError where one is neither three texts nor messages."""
    rows = open_rows(path)
    found = []
    for number, row in enumerate(rows):
        texts = {key: write(row.get(key)) for key, write in _AS_TEXT.items()}
        for key, text in texts.items():
            if not text:
                raise UserError(f"{rows.location(number)}: {key} must be a text or messages with role and content")
        found.append(texts)
    return found


def _messages(value) -> list[dict]:
    """The value if it is messages, else none."""
    messages = value if isinstance(value, list) else []
    known = (isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in messages)
    return messages if all(known) else []


def _prompt_text(prompt) -> str | None:
    """Messages in ChatML, the format of Qwen2 and Fast-dLLM v2: a given tokenizer may have no template."""
    if isinstance(prompt, str):
        return prompt
    turns = [f"<|im_start|>{m['role']}\n{m['content']}{END}\n" for m in _messages(prompt)]
    return "".join([*turns, "<|im_start|>assistant\n"]) if turns else None


def _response_text(response) -> str | None:
    return response if isinstance(response, str) else "\n".join(m["content"] for m in _messages(response))


_AS_TEXT = {"prompt": _prompt_text, "chosen": _response_text, "rejected": _response_text}


def train_tokenizer(rows: Iterable[dict], vocabulary: int):
    """A byte-level BPE of at most ``vocabulary`` tokens on the rows' own texts. Where no tokenizer is given, texts get
    about the lengths that a real one would give them; speed depends on nothing else of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (text for row in itertools.islice(rows, TOKENIZER_TEXTS) for text in row.values())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def open_tokenizer(folder: str | None, rows: Iterable[dict], vocabulary: int):
    """The Hugging Face tokenizer of a folder; of none, one that is trained on ``rows``. Raises UserError."""
    if not folder:
        return train_tokenizer(rows, vocabulary)
    if not Path(folder).is_dir():
        raise UserError(f"--tokenizer {folder}: no such folder")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {folder}: {one_line(error)}") from None


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
