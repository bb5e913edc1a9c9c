"""Which examples of a step go to which process, and which share a packed sequence.

Neither choice changes a result: a loss is a sum over examples. They decide how even the work is and how few sequences
it takes. Costs are packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dtrpo.rounding import ceil_divide


def balance(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Assigns positions ``0 .. len(costs) - 1`` to ``parts`` lists of nearly equal cost: the longest first, each to
    the list that has least so far. No list gets more than its share of items, rounded up."""
    size = ceil_divide(len(costs), parts)
    assigned: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        target = min((p for p in range(parts) if len(assigned[p]) < size), key=lambda p: (totals[p], p))
        assigned[target].append(item)
        totals[target] += costs[item]
    return assigned


def pack(costs: Sequence[int], items: Sequence[int], budget: int, most: int) -> list[list[int]]:
    """Groups ``items`` (positions in ``costs``) so that no group costs more than ``budget`` or holds more than
    ``most``: first fit, the longest first. Every item fits the budget alone."""
    groups: list[list[int]] = []
    room: list[int] = []
    for item in sorted(items, key=lambda i: (-costs[i], i)):
        for g, group in enumerate(groups):
            if costs[item] <= room[g] and len(group) < most:
                group.append(item)
                room[g] -= costs[item]
                break
        else:
            groups.append([item])
            room.append(budget - costs[item])
    return groups
