"""Makes the quickstart's data: sums whose answers a program can check.

A model of a million parameters learns these in minutes, and right is told from wrong without a judge:

    prompt      37+58+6=
    completion  95+6=101

No problem is in two files. Standard library only: this file runs before anything is installed.
"""

import argparse
import json
import random
import sys
from pathlib import Path

RANGES = (range(10, 100), range(10, 100), range(2, 10))
PROBLEMS = len(RANGES[0]) * len(RANGES[1]) * len(RANGES[2])


def record(first: int, second: int, third: int) -> dict:
    """One problem: it is solved from left to right, and ends in its answer."""
    total = first + second + third
    return {"prompt": f"{first}+{second}+{third}=", "completion": f"{first + second}+{third}={total}", "answer": total}


def generate(train: int, problems: int, heldout: int, seed: int = 0) -> dict[str, list[dict]]:
    """File name -> records. Held-out problems come first: they are the same however many others are asked for."""
    everything = [(a, b, c) for a in RANGES[0] for b in RANGES[1] for c in RANGES[2]]
    random.Random(f"arithmetic/{seed}").shuffle(everything)
    records = [record(*numbers) for numbers in everything[: heldout + problems + train]]
    asked = [{"prompt": row["prompt"], "answer": row["answer"]} for row in records[heldout : heldout + problems]]
    return {"heldout.jsonl": records[:heldout], "problems.jsonl": asked, "sft.jsonl": records[heldout + problems :]}


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

    try:
        options.output.mkdir(parents=True, exist_ok=True)
        for filename, records in generate(*counts, options.seed).items():
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
