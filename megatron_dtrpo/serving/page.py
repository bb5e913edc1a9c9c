"""The page at /: a prompt, and its response as it is unmasked, of one checkpoint or of two side by side.

It is made of the parts of the page that replays a decoding (`inference.trace`) and of its own ``page.*``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_dtrpo.inference.trace import filled, page_sources


def page(models: Sequence[tuple[str, bool]]) -> str:
    """HTML that asks this server alone. ``models``: names, and whether they have a chat template."""
    own = {name: Path(__file__).with_name(f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    shared = page_sources()
    sources = {**own, "css": shared["css"] + own["css"], "tokens": shared["tokens"]}
    title = " and ".join(name for name, _ in models)
    return filled(sources, f"Decoding with {title}", [{"name": name, "chat": chat} for name, chat in models])
