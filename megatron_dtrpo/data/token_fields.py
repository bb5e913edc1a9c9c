"""Columns of exact token ids, and of a recorded decoding.

``prompt_ids``, ``chosen_ids``, ``rejected_ids`` or ``completion_ids`` are taken as they are, and with them a recorded
decoding: the step at which each response token was unmasked, ``chosen_steps`` and ``rejected_steps``, and what was
thrown away behind an end token, ``chosen_discarded`` and ``rejected_discarded``.
"""

from __future__ import annotations

from typing import Any

from megatron_dtrpo.data.fields import template_inputs
from megatron_dtrpo.data.messages import kind_of
from megatron_dtrpo.data.record import TokenRecord
from megatron_dtrpo.errors import UserError

MOST = 2**31 - 2  # of an id or a step, so that they, and steps plus one, are 32-bit integers


def has_ids(row: dict[str, Any], names: tuple[str, ...]) -> bool:
    fields = [f"{name}_ids" for name in ("prompt", *names)]
    fields += [f"{name}_{what}" for name in names for what in ("steps", "discarded")]
    return any(row.get(field) is not None for field in fields)


def token_record(row: dict[str, Any], names: tuple[str, ...]) -> TokenRecord:
    ids = [f"{name}_ids" for name in ("prompt", *names)]
    steps, discarded = ([f"{name}_{what}" for name in names] for what in ("steps", "discarded"))
    given = [field for field in ids + steps + discarded if row.get(field) is not None]
    refuse_inputs(row, given[0])
    missing = [field for field in ids if field not in given]
    if missing:
        raise UserError(f"{given[0]} without {missing[0]}; give {', '.join(ids)} together")
    prompt, *responses = (read_integers(row[field], field) for field in ids)
    if not _together(steps, given):
        if _together(discarded, given):
            raise UserError(f"{discarded[0]} without {steps[0]}: give both")
        return TokenRecord(prompt, tuple(responses))
    recorded = tuple(read_integers(row[field], field) for field in steps)
    for field, of, response, each in zip(steps, ids[1:], responses, recorded, strict=True):
        if len(each) != len(response):
            raise UserError(f"{field}: {len(each)} steps for the {len(response)} tokens of {of}; give one per token")
    if not _together(discarded, given):
        return TokenRecord(prompt, tuple(responses), recorded)
    thrown = tuple(_discarded(row[field], field, each) for field, each in zip(discarded, recorded, strict=True))
    return TokenRecord(prompt, tuple(responses), recorded, thrown)


def refuse_inputs(row: dict[str, Any], field: str) -> None:
    """Token ids are whole as given. Beside the messages that they were made of, as `megatron-dtrpo pairs` writes them,
    ``tools`` are in them already. Raises UserError where a row has such columns and nothing that they belong to."""
    names = template_inputs(row).names()
    if names and not isinstance(row.get("prompt"), list):
        raise UserError(f"{names}: {field} are taken as they are, no chat template writes into them; take {names} out")


def _together(fields: list[str], given: list[str]) -> bool:
    """Whether all of ``fields`` are ``given``, or none; raises UserError where some are."""
    found = [field for field in fields if field in given]
    if found and found != fields:
        raise UserError(f"{found[0]} alone; give {' and '.join(fields)} together")
    return bool(found)


DISCARDED = ("place", "token", "step", "until")


def _discarded(value: Any, name: str, steps: list[int]) -> list[tuple[int, int, int, int]]:
    """Discarded tokens of a response that ``steps`` wrote, ordered by place."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{name}: must be a list of objects with {', '.join(DISCARDED)}")
    found = []
    for number, item in enumerate(value):
        for key in DISCARDED:
            if type(item.get(key)) is not int or not 0 <= item[key] <= MOST:
                raise UserError(f"{name}[{number}]: {key} must be an integer from 0 to {MOST}, not {item.get(key)!r}")
        found.append(tuple(item[key] for key in DISCARDED))
    found.sort()
    for number, (place, _, step, until) in enumerate(found):
        if place < len(steps) or (number and place == found[number - 1][0]):
            raise UserError(f"{name}: place {place} holds a token already; the response has {len(steps)}")
        before = {*steps, *(other[2] for other in found[:number])}
        if not step < until or until not in before:
            raise UserError(
                f"{name}: place {place}: until {until} must be the step, after step {step}, that wrote an "
                "end token before it"
            )
    return found


def read_integers(value: Any, name: str) -> list[int]:
    if not isinstance(value, list):
        raise UserError(f"{name}: must be a list of integers, not {kind_of(value)}")
    if not value:
        raise UserError(f"{name}: is an empty list; give at least one token or take the row out")
    for place, item in enumerate(value):
        if type(item) is not int or not 0 <= item <= MOST:
            shown = item if isinstance(item, (int, float)) else kind_of(item)
            raise UserError(f"{name}[{place}]: must be an integer from 0 to {MOST}, not {shown}")
    return value
