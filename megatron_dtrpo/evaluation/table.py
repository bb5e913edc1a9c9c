"""The paper's benchmarks as one Markdown row, in its column order, with tokens per pass beside them.

The three that have harnesses of their own are written into the row by hand; rows and cells that are there are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_dtrpo.errors import UserError

NOTHING = "–"
MODEL, RATE = "model", "tokens per pass"


class Benchmark(NamedTuple):
    """``task``: the harness's, or one whose name begins so; None: it has none. ``metrics``: of it, the first one that
    it has is taken. ``others``: beginnings of names of tasks of other problems, or of a part of them."""

    title: str
    task: str | None = None
    metrics: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


BENCHMARKS = (
    Benchmark("GPQA", "gpqa_diamond_cot_zeroshot", ("exact_match,flexible-extract", "exact_match,strict-match")),
    Benchmark("GSM8K", "gsm8k", ("exact_match,flexible-extract", "exact_match,strict-match"), ("gsm8k_platinum",)),
    Benchmark("MATH", "minerva_math", ("math_verify,none", "exact_match,none"), ("minerva_math_",)),
    Benchmark("LiveCodeBench v6"),
    Benchmark("MBPP+", "mbpp_plus", ("pass_at_1,none", "pass_at_1,extract_code")),
    Benchmark("HumanEval+", "humaneval_plus", ("pass@1,create_test",)),
    Benchmark("IFEval", "ifeval", ("prompt_level_strict_acc,none",), ("ifeval_ca", "ifeval_es")),
    Benchmark("Arena-Hard v2"),
    Benchmark("MT-Bench"),
)
TASKS = ",".join(one.task for one in BENCHMARKS if one.task)
COLUMNS = (MODEL, *(one.title for one in BENCHMARKS), RATE)


def cells_of(results: Mapping[str, Any]) -> dict[str, str]:
    """What the harness's ``results`` say of the columns: percentages, and tokens per pass, if there are any."""
    values = {one.title: _value(_scores(results["results"], one), one) for one in BENCHMARKS}
    found = {title: f"{100 * value:.1f}" for title, value in values.items() if value is not None}
    rate = results.get("efficiency", {}).get("completions/tokens_per_pass")
    if found and rate:
        found[RATE] = f"{rate:.2f}"
    return found


def unread(results: Mapping[str, Any]) -> list[str]:
    """A line for each task of a column that has none of its numbers."""
    found = {one: _scores(results["results"], one) for one in BENCHMARKS}
    return [
        f"{one.task} has no {' or '.join(one.metrics)}: the cell of {one.title} is left as it is"
        for one, scores in found.items()
        if scores and _value(scores, one) is None
    ]


def _value(scores: Mapping[str, Any], one: Benchmark) -> float | None:
    return next((scores[metric] for metric in one.metrics if isinstance(scores.get(metric), (int, float))), None)


def _scores(results: Mapping[str, Mapping[str, Any]], one: Benchmark) -> Mapping[str, Any]:
    if one.task is None:
        return {}
    if one.task in results:
        return results[one.task]
    names = [name for name in results if name.startswith(one.task + "_") and not name.startswith(one.others)]
    return results[names[0]] if len(names) == 1 else {}  # nobody says which of several


def with_row(text: str, model: str, cells: Mapping[str, str], where: str = "the table") -> str:
    """The table ``text``, which may be empty, with the ``cells`` of ``model``; other cells of its row stay.

    Raises UserError where ``text`` is another table.
    """
    lines = text.splitlines()
    head = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    if not text.strip():
        lines = head
    elif _cells(lines[0]) != list(COLUMNS):
        raise UserError(f"{where}: its first line is not that of this table; give a file that is not there yet")
    name = model.replace("|", "/")
    rows = {_cells(line)[0]: number for number, line in enumerate(lines[2:], 2) if line.strip()}
    old = _cells(lines[rows[name]]) if name in rows else [name] + [NOTHING] * (len(COLUMNS) - 1)
    if len(old) != len(COLUMNS):
        raise UserError(f"{where}:{rows[name] + 1}: {len(old)} cells, the table has {len(COLUMNS)} columns")
    row = _line([cells.get(title, before) for title, before in zip(COLUMNS, old, strict=True)])
    if name in rows:
        lines[rows[name]] = row
    else:
        lines.append(row)
    return "\n".join(lines) + "\n"


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.sub(r"^\s*\||\|\s*$", "", line).split("|")]
