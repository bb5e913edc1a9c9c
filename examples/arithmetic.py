"""Makes the quickstart's data: sums whose answers a program can check.

A model of a million parameters learns these in minutes, and right is told from wrong without a judge:

    prompt      37+58+6=
    completion  95+6=101

The worked examples to imitate, sft.jsonl, come from a careless pupil who forgets every other carry (37+58=85).
Imitation learns the habit with the sums; preferences between right and wrong answers unlearn it. Held-out solutions are
all right. No problem is in two files. Standard library only: this file runs before anything is installed.
"""

import argparse
import json
import random
import sys
from pathlib import Path

RANGES = (range(10, 100), range(10, 100), range(2, 10))
FORGOTTEN = 0.5  # share of the carries that the careless pupil forgets
PROBLEMS = len(RANGES[0]) * len(RANGES[1]) * len(RANGES[2])


def add(left: int, right: int, forgets_carry: bool = False) -> int:
    """The sum, or what it comes to where the units' carry is forgotten."""
    carries = left % 10 + right % 10 >= 10
    return left + right - 10 * (carries and forgets_carry)


def record(numbers: tuple[int, int, int], rng: random.Random | None = None) -> dict:
    """One problem, solved from left to right, and its answer; with ``rng`` by the careless pupil."""
    first, second, third = numbers
    forgets = [rng is not None and rng.random() < FORGOTTEN for _ in range(2)]
    between = add(first, second, forgets[0])
    solution = f"{between}+{third}={add(between, third, forgets[1])}"
    return {"prompt": f"{first}+{second}+{third}=", "completion": solution, "answer": sum(numbers)}


def generate(train: int, problems: int, heldout: int, seed: int = 0) -> dict[str, list[dict]]:
    """File name -> records. Held-out problems come first: they are the same however many others are asked for."""
    everything = [(a, b, c) for a in RANGES[0] for b in RANGES[1] for c in RANGES[2]]
    random.Random(f"arithmetic/{seed}").shuffle(everything)
    asked, rest = everything[heldout : heldout + problems], everything[heldout + problems :][:train]
    pupil = random.Random(f"careless/{seed}")
    return {
        "heldout.jsonl": [record(numbers) for numbers in everything[:heldout]],
        "problems.jsonl": [{key: record(numbers)[key] for key in ("prompt", "answer")} for numbers in asked],
        "sft.jsonl": [record(numbers, pupil) for numbers in rest],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the three files go")
    parser.add_argument("--train", type=int, required=True, metavar="N", help="solved problems in sft.jsonl")
    parser.add_argument("--problems", type=int, required=True, metavar="N", help="unsolved ones in problems.jsonl")
    parser.add_argument("--heldout", type=int, required=True, metavar="N", help="solved problems in heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: 0)")
    options = parser.parse_args(arguments)
    counts = (options.train, options.problems, options.heldout)
    if min(counts) < 0 or sum(counts) > PROBLEMS:
        return fail(f"--train, --problems and --heldout must not be negative, and at most {PROBLEMS} together")
    return write_files(options.output, generate(*counts, options.seed))


def write_files(output: Path, files: dict[str, list[dict]]) -> int:
    """Writes file name -> records as JSON lines into a folder, and says how many; returns the exit status."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for filename, records in files.items():
            text = "".join(json.dumps(record) + "\n" for record in records)
            (output / filename).write_text(text, encoding="utf-8")
            print(f"{output / filename}: {len(records)}")
    except OSError as error:
        return fail(f"--output {output}: {error.strerror}")
    return 0


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
