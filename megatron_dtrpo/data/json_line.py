"""One row as one line of a JSONL file."""

from __future__ import annotations

import json
from typing import Any


def json_line(row: dict[str, Any]) -> str:
    """``row`` as JSON, with its line end. Values that only tables know, such as dates, become text."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape and a file cannot hold
        line = json.dumps(row, default=str)
    return line + "\n"
