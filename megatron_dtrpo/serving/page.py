"""The page at /: a prompt, and its response as it is unmasked, of one checkpoint or of two side by side.

It is made of the parts of the page that replays a decoding (`inference.trace`) and of its own ``page.*``.
"""

from __future__ import annotations


def page(models: list[tuple[str, bool]]) -> str:
    """HTML. ``models``: names, and whether they have a chat template."""
    raise NotImplementedError
