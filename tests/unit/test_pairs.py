"""Which answers of a policy make a pair."""

from __future__ import annotations

import itertools
import json

import pytest

from megatron_dtrpo.data.prompts import Prompt
from megatron_dtrpo.diffusion.decoding import Completion
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.online.pairs import Pairs, Rewarded, different, preferences

PROMPT = Prompt({"prompt": "2+2=", "answer": 4}, "row 1", "2+2=", [1, 2], "2+2=")


def answer(number: int, reward: float, ended: bool = True) -> Rewarded:
    completion = Completion([number], [0], [0.5], [0], passes=1, ended=ended, discarded=[])
    return Rewarded(completion, f"text {number}", reward)


def test_right_and_wrong_answers_are_paired_in_their_order():
    """Of every group of up to four answers, right or wrong, ended or not: the first right one that ended with the first
    wrong one, and so on."""
    kinds = list(itertools.product((0.0, 1.0), (True, False)))
    for group in itertools.chain.from_iterable(itertools.product(kinds, repeat=n) for n in range(5)):
        answers = [answer(number, reward, ended) for number, (reward, ended) in enumerate(group)]
        right = [each for each in answers if each.reward and each.completion.ended]
        wrong = [each for each in answers if not each.reward]
        assert preferences(answers) == list(zip(right, wrong, strict=False)), group


def test_the_best_is_paired_with_the_worst():
    """Of every order of rewards, with ties: no answer twice, every chosen one better, none left of another reward."""
    for rewards in itertools.product((-1.0, 0.0, 0.5, 2.0), repeat=5):
        answers = [answer(number, reward) for number, reward in enumerate(rewards)]
        pairs = preferences(answers)
        assert len({each.text for pair in pairs for each in pair}) == 2 * len(pairs)
        assert [c.reward for c, _ in pairs] == sorted(rewards, reverse=True)[: len(pairs)]
        assert [r.reward for _, r in pairs] == sorted(rewards)[: len(pairs)]
        assert all(chosen.reward > rejected.reward for chosen, rejected in pairs)
        left = sorted(rewards)[len(pairs) : len(rewards) - len(pairs)]
        assert len(set(rewards)) == 1 or pairs
        assert len(left) < 2 or left[-1] == left[0]  # or another pair could have been made


def test_equal_answers_count_once():
    completions = [answer(number, 1.0).completion for number in (7, 8, 7, 9, 8)]
    assert sorted(completions[place].tokens[0] for place in different(completions)) == [7, 8, 9]
    assert set(different(completions)) == {0, 1, 3}


def test_counts_and_rows(tmp_path):
    pairs = Pairs(most=1)
    pairs.add(PROMPT, [answer(1, 1.0), answer(2, 0.0), answer(3, 1.0), answer(4, 0.0)])
    pairs.add(PROMPT, [answer(1, 1.0, ended=False), answer(2, 0.0)])
    assert pairs.counts == "3 right, of which 1 have no end token and make no pair, 3 wrong"
    assert (pairs.prompts, pairs.paired, pairs.answers) == (2, 1, 6)
    pairs.write(tmp_path / "pairs.jsonl")
    (row,) = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert (row["answer"], row["prompt_ids"], row["chosen"], row["rejected_ids"]) == (4, [1, 2], "text 1", [2])
    with pytest.raises(UserError, match=r"none/pairs.jsonl: cannot be written \(No such file"):
        pairs.write(tmp_path / "none" / "pairs.jsonl")
