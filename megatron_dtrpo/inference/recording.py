"""How a decoding is written into a row of data; `data.records` reads it."""

from __future__ import annotations

from typing import Any

from megatron_dtrpo.diffusion.decoding import Completion


def discarded_rows(completion: Completion) -> list[dict[str, Any]]:
    """The tokens that the decoding threw away, as JSON has them."""
    return [{**token._asdict(), "confidence": round(token.confidence, 6)} for token in completion.discarded]
