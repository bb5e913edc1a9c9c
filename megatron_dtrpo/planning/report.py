"""Plans and layouts as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from megatron_dtrpo.planning.layouts import Layout
from megatron_dtrpo.planning.memory import GIB, Plan

# Field of a plan -> its line in the table.
_PARTS = {
    "weights": "weights",
    "fp8_weights": "weights in FP8",
    "gradients": "gradients (fp32)",
    "optimizer": "optimizer",
    "reference": "reference copy",
    "activations": "activations",
    "head": "head, logits",
    "overhead": "overhead (assumed)",
}
assert set(_PARTS) == {f.name for f in fields(Plan)}


def gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def memory_table(plans: Sequence[Plan]) -> list[str]:
    """GiB per GPU, a column for each pipeline stage."""
    rows = [("GiB per GPU", *(f"stage {number}" for number in range(len(plans))))]
    for name, words in _PARTS.items():
        sizes = [getattr(plan, name) for plan in plans]
        if any(sizes):
            rows.append((words, *map(gib, sizes)))
    rows.append(("total", *(gib(plan.total) for plan in plans)))
    return _aligned(rows)


def layout_table(layouts: Sequence[Layout]) -> list[str]:
    """One line a layout: GiB on the GPU of the stage that needs most, seconds a step."""
    head = "|TP|PP|CP|DP|recompute|weights|grads|optim|ref|activ|head|total GiB|s/step|bubble"
    rows: list[tuple[str, ...]] = [tuple(head.split("|"))]
    for layout in layouts:
        plan, seconds = layout.worst, layout.seconds
        rows.append(
            (
                "fits" if layout.fits else "too large",
                *map(str, layout.sizes),
                layout.recomputation,
                gib(plan.weights + plan.fp8_weights),
                *map(gib, (plan.gradients, plan.optimizer, plan.reference, plan.activations, plan.head, plan.total)),
                f"{seconds.total:.2f}",
                f"{seconds.bubble / seconds.total:.0%}",
            )
        )
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = (
            cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return lines
