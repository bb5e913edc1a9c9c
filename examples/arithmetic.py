"""Makes the quickstart's data: arithmetic word problems whose answers a program can check.

A model of a million parameters learns these in minutes, and `final_answer` tells right from wrong without a judge:

    prompt     Tom has 37 apples, buys 58 and sells 6. How many now?
    chosen     37+58=95, 95-6=89. Answer: 89
    rejected   37+58=85, 85-6=79. Answer: 79

A rejected solution makes one mistake, as a pupil would (a slip, a wrong operation, a number left out), and goes on
correctly from there. Held-out problems are kept apart by their numbers and operations, so no training text contains
them in other words either. Standard library only: this file runs before anything is installed.
"""

import argparse
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

LARGEST = 99
LARGEST_TOTAL = 500_000  # well below the number of different problems, so that drawing new ones ends
NAMES = ("Tom", "Ann", "Ben", "Eva", "Sam", "Mia")
THINGS = ("apples", "books", "coins", "pens", "cards", "stamps")
SLIPS = (-10, 10, -1, 1, -2, 2)  # a carry forgotten or made up, a miscount


@dataclass(frozen=True)
class Scene:
    """One way to tell a problem: how it starts, and how numbers are added and taken away."""

    opening: str
    gains: tuple[str, ...]
    losses: tuple[str, ...]


SCENES = (
    Scene(
        "{name} has {n} {thing}", ("buys {n}", "finds {n}", "gets {n}"), ("sells {n}", "loses {n}", "gives away {n}")
    ),
    Scene("A shelf holds {n} {thing}", ("{n} are added", "{n} come in"), ("{n} are taken", "{n} are sold")),
    Scene("A bus has {n} people", ("{n} get on",), ("{n} get off",)),
)


@dataclass(frozen=True)
class Problem:
    """`numbers[0] operations[0] numbers[1] ...`, worked from left to right."""

    numbers: tuple[int, ...]
    operations: tuple[str, ...]

    def results(self) -> list[int]:
        """What each step comes to."""
        results = []
        total = self.numbers[0]
        for operation, number in zip(self.operations, self.numbers[1:], strict=True):
            total = calculate(total, operation, number)
            results.append(total)
        return results

    def answer(self) -> int:
        return self.results()[-1]

    def solvable(self) -> bool:
        """No step goes below zero: nobody sells apples that he has not got."""
        return min(self.results()) >= 0


def calculate(left: int, operation: str, right: int) -> int:
    return left + right if operation == "+" else left - right


def solution(problem: Problem, slip_at: int | None = None, slip: int = 0) -> str:
    """The worked solution; with `slip_at`, that step's result is off by `slip` and the rest follows from it."""
    steps = []
    total = problem.numbers[0]
    for i, (operation, number) in enumerate(zip(problem.operations, problem.numbers[1:], strict=True)):
        result = calculate(total, operation, number) + (slip if i == slip_at else 0)
        steps.append(f"{total}{operation}{number}={result}")
        total = result
    return f"{', '.join(steps)}. Answer: {total}"


def final_answer(text: str) -> int | None:
    """The number a solution ends in, or None where it gives none. This is the verifier."""
    answers = re.findall(r"Answer: *(-?\d+)", text)
    return int(answers[-1]) if answers else None


def random_problem(rng: random.Random) -> Problem:
    while True:
        count = rng.choice((2, 3, 3))
        numbers = tuple(rng.randint(2, LARGEST) for _ in range(count))
        operations = tuple(rng.choice("+-") for _ in range(count - 1))
        problem = Problem(numbers, operations)
        if problem.solvable():
            return problem


def tell(problem: Problem, rng: random.Random) -> str:
    """The problem in words. Ends in a space, so that a solution can follow directly."""
    scene = rng.choice(SCENES)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    text = scene.opening.format(name=name, thing=thing, n=problem.numbers[0])
    for i, (operation, number) in enumerate(zip(problem.operations, problem.numbers[1:], strict=True)):
        last = i == len(problem.operations) - 1
        phrase = rng.choice(scene.gains if operation == "+" else scene.losses)
        text += (" and " if last else ", ") + phrase.format(n=number)
    return text + ". How many now? "


def wrong_solution(problem: Problem, rng: random.Random) -> str:
    """A plausible solution with one mistake in it, and therefore another answer."""
    mistakes = (_slip, _wrong_operation, _left_out)
    while True:
        text = rng.choice(mistakes)(problem, rng)
        # None: this mistake cannot be made here. The comparison is a guard: one mistake always shifts the answer.
        if text is not None and final_answer(text) != problem.answer():
            return text


def _slip(problem: Problem, rng: random.Random) -> str | None:
    step, slip = rng.randrange(len(problem.operations)), rng.choice(SLIPS)
    # The slip shifts its own step and all later ones.
    possible = min(problem.results()[step:]) + slip >= 0
    return solution(problem, step, slip) if possible else None


def _wrong_operation(problem: Problem, rng: random.Random) -> str | None:
    step = rng.randrange(len(problem.operations))
    operations = list(problem.operations)
    operations[step] = "-" if operations[step] == "+" else "+"
    mistaken = Problem(problem.numbers, tuple(operations))
    return solution(mistaken) if mistaken.solvable() else None


def _left_out(problem: Problem, rng: random.Random) -> str | None:
    if len(problem.numbers) < 3:
        return None
    step = rng.randrange(len(problem.operations))
    numbers = problem.numbers[: step + 1] + problem.numbers[step + 2 :]
    operations = problem.operations[:step] + problem.operations[step + 1 :]
    mistaken = Problem(numbers, operations)
    return solution(mistaken) if mistaken.solvable() else None


def draw(count: int, rng: random.Random, prompts: set[str], kept_apart: set[Problem]) -> list[tuple[Problem, str]]:
    """`count` problems in words that are not among `prompts` (which they join), none of them in `kept_apart`."""
    drawn = []
    while len(drawn) < count:
        problem = random_problem(rng)
        prompt = tell(problem, rng)
        if prompt not in prompts and problem not in kept_apart:
            prompts.add(prompt)
            drawn.append((problem, prompt))
    return drawn


def generate(train: int, pairs: int, heldout: int, seed: int = 0) -> dict[str, list[dict]]:
    """File name -> records. Held-out pairs come first: they are the same however much training data is asked for."""

    def generator(use: str) -> random.Random:
        return random.Random(f"{seed}/{use}")

    def pair_records(drawn: list[tuple[Problem, str]], rng: random.Random) -> list[dict]:
        return [
            {"prompt": t, "chosen": solution(p), "rejected": wrong_solution(p, rng), "answer": p.answer()}
            for p, t in drawn
        ]

    prompts: set[str] = set()
    drawn_heldout = draw(heldout, generator("heldout"), prompts, set())
    kept_apart = {problem for problem, _ in drawn_heldout}
    drawn_pairs = draw(pairs, generator("pairs"), prompts, kept_apart)
    drawn_train = draw(train, generator("train"), prompts, kept_apart)
    return {
        "sft.jsonl": [{"prompt": t, "completion": solution(p), "answer": p.answer()} for p, t in drawn_train],
        "pairs_train.jsonl": pair_records(drawn_pairs, generator("pairs mistakes")),
        "pairs_heldout.jsonl": pair_records(drawn_heldout, generator("heldout mistakes")),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the three files go")
    parser.add_argument("--train", type=int, required=True, metavar="N", help="examples in sft.jsonl")
    parser.add_argument("--pairs", type=int, required=True, metavar="N", help="pairs in pairs_train.jsonl")
    parser.add_argument("--heldout", type=int, required=True, metavar="N", help="pairs in pairs_heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: 0)")
    options = parser.parse_args(arguments)
    counts = (options.train, options.pairs, options.heldout)
    if min(counts) < 0 or sum(counts) > LARGEST_TOTAL:
        return fail(f"--train, --pairs and --heldout must not be negative, and at most {LARGEST_TOTAL} together")

    files = generate(*counts, options.seed)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        for filename, records in files.items():
            text = "".join(json.dumps(record) + "\n" for record in records)
            (options.output / filename).write_text(text, encoding="utf-8")
            print(f"{options.output / filename}: {len(records)}")
    except OSError as error:
        return fail(f"--output {options.output}: {error.strerror}")
    return 0


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
