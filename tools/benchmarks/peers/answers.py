"""Groups of answers with recorded decodings, of the shape that rollouts have.

Prompts are the data's own, in ChatML. Weights are random, and would answer noise, one token a step: so an answer is cut
from the data's answers, and its decoding drawn as a decoder with a threshold writes. Speed depends on the lengths and
on which step wrote which place, and on nothing else of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.data.prompts import Prompt
from megatron_dtrpo.data.rows import open_rows
from megatron_dtrpo.diffusion.decoding import Completion
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.online.rollouts import Group
from tools.benchmarks.peers.pairs import END


class Kind(NamedTuple):
    """A kind of model: ``family`` of `peers.weights`, block size, sub-block, and prediction shift (see
    `families.Family`)."""

    title: str
    family: str
    block_size: int
    small_block_size: int
    shift: int


KINDS = {
    "sdar": Kind("SDAR's block of 4", "sdar", 4, 4, 0),
    "fast_dllm_v2": Kind("Fast-dLLM v2's block of 32, sub-blocks of 8", "qwen2", 32, 8, 1),
}


def answer_rows(path: Path) -> list[dict]:
    """The prompts and answers of a file of ``prompt`` and ``completion`` or ``chosen``, all texts. Raises UserError."""
    rows = open_rows(path)
    found = []
    for number, row in enumerate(rows):
        prompt, answer = row.get("prompt"), row.get("completion", row.get("chosen"))
        if not (isinstance(prompt, str) and prompt and isinstance(answer, str) and answer):
            raise UserError(f"{rows.location(number)}: prompt and completion (or chosen) must be texts")
        found.append(chat_row(prompt, answer))
    return found


def chat_row(prompt: str, answer: str) -> dict:
    return {"prompt": f"<|im_start|>user\n{prompt}{END}\n<|im_start|>assistant\n", "answer": answer}


def make_group(
    rows: Sequence[dict], index: int, encode, end: int, kind: Kind, *, answers: int, length: int, sure: float
) -> Group:
    """The group of row ``index``: ``answers`` answers of three to five quarters of ``length`` tokens.

    Args:
        encode: from a text to token ids.
        end: the id of the end token, the last one of each answer.
        sure: the probability that the decoder is surer of a masked token than its threshold.
    """
    rng = random.Random(index)
    prompt = encode(rows[index]["prompt"])
    completions = []
    for _ in range(answers):
        wanted, tokens = rng.randint(length * 3 // 4, length * 5 // 4), encode(rows[index]["answer"])
        while len(tokens) < wanted:
            tokens = tokens + encode(rng.choice(rows)["answer"])
        tokens = [*tokens[: wanted - 1], end]
        steps = drawn_steps(len(prompt), len(tokens), kind, sure, rng)
        blocks = [position // kind.block_size for position in range(len(prompt), len(prompt) + len(tokens))]
        completions.append(Completion(tokens, steps, [1.0] * len(tokens), blocks, len(set(steps)), True, []))
    advantages = np.linspace(-1.0, 1.0, answers)
    return Group(
        sample=Sample(0, index),
        prompt=Prompt(rows[index], f"row {index + 1}", rows[index]["prompt"], prompt, rows[index]["prompt"]),
        members=list(range(answers)),
        completions=completions,
        texts=[""] * answers,
        rewards=advantages[:, None],
        total=advantages,
        advantages=advantages,
    )


def drawn_steps(P: int, R: int, kind: Kind, sure: float, rng: random.Random) -> list[int]:
    """Which step wrote each of ``R`` tokens behind a prompt of ``P``. A step writes, of what is masked in a sub-block,
    one token, and each other one with probability ``sure``. With prediction shift 1 a block's first token has a step of
    its own: the clean pass of the block before predicts it."""
    steps, step = [0] * R, 0
    for first in range(P // kind.block_size * kind.block_size, P + R, kind.small_block_size):
        masked = [p for p in range(max(first, P), min(first + kind.small_block_size, P + R))]
        if kind.shift and masked and masked[0] % kind.block_size == 0:
            steps[masked.pop(0) - P], step = step, step + 1
        while masked:
            surest = rng.choice(masked)
            written = [p for p in masked if p == surest or rng.random() < sure]
            for position in written:
                steps[position - P] = step
            step += 1
            masked = [p for p in masked if p not in written]
    return steps
