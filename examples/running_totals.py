"""Makes the data of compare_estimators.sh: running totals, whose answers take several blocks and steps that depend on
each other.

    prompt      23+8+6+9+4+7=
    completion  23+8=31;31+6=37;37+9=46;46+4=50;50+7=57

The worked examples to imitate, sft.jsonl, come from a careless pupil who forgets seven of ten carries where 8 or 9 is
added (23+8=21), and goes on from there. Imitation learns the habit with the sums; preferences between right and wrong
answers unlearn it. Held-out solutions are all right. No problem is in two files. Standard library only.
"""

import argparse
import random
import sys
from pathlib import Path

from arithmetic import fail, write_files

FIRST, TERM = range(10, 40), range(1, 10)  # every total has two digits
STEPS = 5
FORGOTTEN = 0.7  # share of the carries that the careless pupil forgets ...
LARGE = 8  # ... where a term of at least this is added
PROBLEMS = len(FIRST) * len(TERM) ** STEPS


def add(total: int, term: int, forgets: bool = False) -> int:
    """The sum, or what it comes to where the carry of a large term is forgotten."""
    carries = total % 10 + term >= 10
    return total + term - 10 * (carries and term >= LARGE and forgets)


def record(numbers: list[int], rng: random.Random | None = None) -> dict:
    """One problem, solved from left to right, and its answer; with ``rng`` by the careless pupil."""
    total, steps = numbers[0], []
    for term in numbers[1:]:
        after = add(total, term, rng is not None and rng.random() < FORGOTTEN)
        steps.append(f"{total}+{term}={after}")
        total = after
    return {"prompt": "+".join(map(str, numbers)) + "=", "completion": ";".join(steps), "answer": sum(numbers)}


def unrank(index: int) -> list[int]:
    """The numbers of problem ``index`` of all ``PROBLEMS``."""
    terms = []
    for _ in range(STEPS):
        index, digit = divmod(index, len(TERM))
        terms.append(TERM[digit])
    return [FIRST[index], *terms]


def generate(train: int, problems: int, heldout: int, pairs: int, seed: int = 0) -> dict[str, list[dict]]:
    """File name -> records: solved problems to imitate, unsolved ones for training pairs and for held-out pairs, and
    solved ones that are held out."""
    chosen = random.Random(f"running totals/{seed}").sample(range(PROBLEMS), heldout + pairs + problems + train)
    everything = iter([unrank(index) for index in chosen])
    pupil = random.Random(f"careless/{seed}")

    def some(count: int, keys: tuple[str, ...], rng: random.Random | None = None) -> list[dict]:
        solved = [record(next(everything), rng) for _ in range(count)]
        return [{key: row[key] for key in keys} for row in solved]

    asked, whole = ("prompt", "answer"), ("prompt", "completion", "answer")
    return {
        "heldout.jsonl": some(heldout, whole),
        "problems_heldout.jsonl": some(pairs, asked),
        "problems.jsonl": some(problems, asked),
        "sft.jsonl": some(train, whole, pupil),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the four files go")
    parser.add_argument("--train", type=int, required=True, metavar="N", help="solved problems in sft.jsonl")
    parser.add_argument("--problems", type=int, required=True, metavar="N", help="unsolved ones in problems.jsonl")
    parser.add_argument("--heldout", type=int, required=True, metavar="N", help="solved problems in heldout.jsonl")
    parser.add_argument(
        "--heldout-pairs",
        type=int,
        default=0,
        metavar="N",
        help="unsolved problems in problems_heldout.jsonl (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: 0)")
    options = parser.parse_args(arguments)
    counts = (options.train, options.problems, options.heldout, options.heldout_pairs)
    if min(counts) < 0 or sum(counts) > PROBLEMS:
        return fail(f"the four numbers of problems must not be negative, and at most {PROBLEMS} together")
    return write_files(options.output, generate(*counts, options.seed))


if __name__ == "__main__":
    sys.exit(main())
