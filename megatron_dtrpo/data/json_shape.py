"""The shape of a JSON file: where it opens and closes brackets, found without holding its values in memory."""

from __future__ import annotations

import json
import mmap
import re
from dataclasses import dataclass, field

# A whole string, so that brackets and commas in one do not count, or a character that gives an array its shape.
TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)
_SPACE = re.compile(rb"\s*")


@dataclass
class TopObject:
    """The object that a file begins with: its keys; where the lists of objects among its values open, by key; whether
    nothing follows it; whether it is written in several lines."""

    keys: list[str] = field(default_factory=list)
    lists: dict[str, int] = field(default_factory=dict)
    is_alone: bool = False
    is_indented: bool = False


def top_object(text: mmap.mmap) -> TopObject | None:
    """None where ``text`` does not begin with an object, or ends inside it."""
    found, depth, begin = TopObject(), 0, 0
    for token in TOKEN.finditer(text):
        shape = token[0]
        if depth == 0:
            if shape != b"{":
                return None
            begin = token.start()
        elif depth == 1 and shape[:1] == b'"' and _next(text, token.end()) == b":":
            found.keys.append(_name(shape))
        elif depth == 1 and shape == b"[" and _next(text, token.end()) == b"{" and found.keys:
            found.lists[found.keys[-1]] = token.start()
        depth += (shape in b"[{") - (shape in b"]}")
        if depth == 0:
            found.is_alone = not _next(text, token.end())
            found.is_indented = text.find(b"\n", begin, token.end()) >= 0
            return found
    return None


def _next(text: mmap.mmap, place: int) -> bytes:
    """The first character from ``place`` on that is no white space; empty at the end."""
    at = _SPACE.match(text, place).end()
    return text[at : at + 1]


def _name(token: bytes) -> str:
    try:
        return json.loads(token)
    except ValueError:
        return token.decode("utf-8", "replace")
