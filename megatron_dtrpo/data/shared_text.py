"""The prompt that two texts share which were written as whole dialogues, as HH-RLHF's are."""

from __future__ import annotations

import os
import re

from megatron_dtrpo.errors import UserError

# Where a speaker begins, up to and with the words that say who it is: HH-RLHF's way, and the chat templates'.
_TURN = re.compile(
    r"(?:^|\n)[ \t]*(?:#+ *)?(?P<plain>Human|User|Assistant|AI|Bot)[ \t]*:"
    r"|<\|im_start\|>(?P<chatml>\w+)\n|<\|start_header_id\|>(?P<llama>\w+)<\|end_header_id\|>\n\n"
    r"|<\|(?P<tag>user|assistant|system)\|>\n?",
    re.IGNORECASE,
)
_ASSISTANT = ("assistant", "ai", "bot")


def shared_prompt(chosen: str, rejected: str) -> str:
    """The beginning that both texts share, cut after the last words that say that the assistant speaks, else before the
    white space in front of the first word that is not shared. So no token lies across the cut.

    Raises UserError where nothing is shared, or where the dialogues go on after the answers at which they part.
    """
    shared = os.path.commonprefix([chosen, rejected])
    turns = list(_TURN.finditer(shared))
    if not turns:
        return _shared_words(shared, chosen, rejected)
    if _speaker(turns[-1]) not in _ASSISTANT:
        raise UserError("chosen and rejected part before the assistant's answer; give dialogues equal up to it")
    speakers, end = {_speaker(turn) for turn in turns}, turns[-1].end()
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if any(_speaker(turn) in speakers for turn in _TURN.finditer(text, end)):
            raise UserError(f"{name}: another turn follows the answer; end both after the first answer that differs")
    return shared[:end]


def _speaker(turn: re.Match) -> str:
    return next(name for name in turn.groups() if name is not None).lower()


def _shared_words(shared: str, chosen: str, rejected: str) -> str:
    whole = not shared[-1:].isspace() and all(text[len(shared) :][:1].isspace() for text in (chosen, rejected))
    end = len(shared)
    while not whole and end > 0 and not shared[end - 1].isspace():
        end -= 1
    prompt = shared[:end].rstrip()
    if not prompt:
        raise UserError("chosen and rejected share no first word; give the prompt")
    return prompt
