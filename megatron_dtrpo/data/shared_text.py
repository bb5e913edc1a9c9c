"""The prompt that two texts share which were written as whole dialogues, as HH-RLHF's are."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from megatron_dtrpo.errors import UserError


class _Format(NamedTuple):
    """How dialogues are written. ``label`` matches where a turn begins, with the speaker's name as its group; a name in
    ``answering`` is the assistant's.

    ``names_vary``: labels are words with a colon, which answers hold too, so only the names that came first are turns.
    ``asks_first``: the answering name is a label only behind another one, for it is a usual word.
    """

    label: re.Pattern
    answering: frozenset[str]
    names_vary: bool = False
    asks_first: bool = False


def _named(asking: str, answering: str, asks_first: bool = False) -> _Format:
    """``Human: ...`` at the beginning of a line, maybe as a heading or in bold."""
    names = f"{asking} {answering}".replace(" ", "|")
    label = rf"(?:^|\n)[ \t]*(?:#+[ \t]*|\*\*)?({names})(?:\*\*)?[ \t]*[:\uff1a](?:\*\*)?"
    return _Format(re.compile(label, re.IGNORECASE), frozenset(answering.split()), True, asks_first)


def _tagged(label: str, answering: str = "assistant") -> _Format:
    """Labels that stand in no other text."""
    return _Format(re.compile(label, re.IGNORECASE), frozenset(answering.split()))


_FORMATS = (
    _named("human user customer client prompter student", "assistant ai bot chatbot gpt chatgpt claude"),
    _named("q", "a", asks_first=True),
    _named("question query problem", "answer assistant response solution", asks_first=True),
    _named("instructions? prompt task input", "response output assistant completion answer", asks_first=True),
    _named("\u95ee \u7528\u6237", "\u7b54 \u52a9\u624b"),
    # Vicuna's and OpenChat's, within a line.
    _Format(re.compile(r"(?:^|\s|</s>)(USER|HUMAN|ASSISTANT):"), frozenset({"assistant"}), True),
    _tagged(r"GPT4 Correct (User|Assistant):"),
    _tagged(r"\[(/?INST)\]", "/inst"),
    _tagged(r"<start_of_turn>(\w+)\n", "model"),
    _tagged(r"<\|im_start\|>(\w+)(?:\n|<\|im_sep\|>)"),
    _tagged(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n"),
    _tagged(r"<\|header_start\|>(\w+)<\|header_end\|>\n\n"),
    _tagged(r"<\|start_of_role\|>(\w+)<\|end_of_role\|>"),
    _tagged(r"<\|START_OF_TURN_TOKEN\|><\|(\w+)_TOKEN\|>", "chatbot"),
    _tagged(r"<[|\uff5c](user|assistant|system|prompter|bot|observation)[|\uff5c]>:?\n?", "assistant bot"),
)
_LINE_END = re.compile(r"[ \t]*\n+")
_NAME = re.compile(r"[ \t]*(?:#+[ \t]*|\*\*)?[^\W\d][\w ]{0,20}(?:\*\*)?[:\uff1a](?:\*\*)?(?=\s)")


def shared_prompt(chosen: str, rejected: str) -> tuple[str, bool]:
    """The beginning that both texts share, and whether labels of a known format say that the assistant speaks behind
    it.

    Without labels it is cut at the end of a line, or behind a name at its beginning; in a single line in front of the
    white space before the first word that is not shared. So no token lies across the cut. Raises UserError where
    nothing is shared, or where the dialogues part elsewhere than in their last answer.
    """
    shared = os.path.commonprefix([chosen, rejected])
    turns = _Turns.of(shared, chosen, rejected)
    if turns is None:
        return _shared_lines(shared, chosen, rejected), False
    begin = turns.answer_begin(shared)
    if begin is None:
        raise UserError(
            "chosen and rejected part before the assistant's answer; end both after the first answer that differs"
        )
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if turns.follow(text, begin):
            raise UserError(f"{name}: another turn follows the answer; end both after the first answer that differs")
    line_end = _LINE_END.match(shared, begin)
    return shared[: line_end.end() if line_end and _is_whole_line(shared, chosen, rejected) else begin], True


class _Turns:
    """The turns of a format whose names are known."""

    def __init__(self, form: _Format, names: set[str] | None) -> None:
        self.form, self.names = form, names

    @classmethod
    def of(cls, shared: str, chosen: str, rejected: str) -> _Turns | None:
        """Those of the format whose label comes first in ``shared``; None where no format is certain."""
        first = {number: match.start() for number, form in enumerate(_FORMATS) if (match := form.label.search(shared))}
        for form in (_FORMATS[number] for number in sorted(first, key=first.get)):
            names = [cls._names(form, text) for text in (chosen, rejected)]
            if all(form.answering.isdisjoint(each) for each in names):
                continue
            if form.asks_first and names[0][0] in form.answering:
                continue
            return cls(form, set(names[0]) | set(names[1]) if form.names_vary else None)
        return None

    @staticmethod
    def _names(form: _Format, text: str) -> list[str]:
        """The first name of each kind, in their order."""
        kinds: dict[bool, str] = {}
        for match in form.label.finditer(text):
            name = match[1].lower()
            kinds.setdefault(name in form.answering, name)
        return list(kinds.values())

    def _in(self, text: str, start: int = 0) -> list[re.Match]:
        return [m for m in self.form.label.finditer(text, start) if self.names is None or m[1].lower() in self.names]

    def answer_begin(self, shared: str) -> int | None:
        """The end of the label of the answer that both texts begin; None where they part in another turn."""
        begin = None
        for turn in self._in(shared):
            answers = turn[1].lower() in self.form.answering
            begin = None if not answers else turn.end() if begin is None else begin
        return begin

    def follow(self, text: str, begin: int) -> bool:
        return bool(self._in(text, begin))


def _shared_lines(shared: str, chosen: str, rejected: str) -> str:
    """The shared start of texts without labels."""
    line = shared.rfind("\n") + 1
    name = _NAME.match(shared, line)
    if not shared[:line].strip() or not _is_whole_line(shared, chosen, rejected):
        return _shared_words(shared, chosen, rejected)
    return shared[: name.end() if name else line]


def _is_whole_line(shared: str, chosen: str, rejected: str) -> bool:
    """Whether no text goes on with another line end, which a tokenizer would join with one before it."""
    return not any(text.startswith("\n", len(shared)) for text in (chosen, rejected) if shared.endswith("\n"))


def _shared_words(shared: str, chosen: str, rejected: str) -> str:
    whole = not shared[-1:].isspace() and all(text[len(shared) :][:1].isspace() for text in (chosen, rejected))
    end = len(shared)
    while not whole and end > 0 and not shared[end - 1].isspace():
        end -= 1
    prompt = shared[:end].rstrip()
    if not prompt:
        raise UserError("chosen and rejected share no first word; give the prompt")
    return prompt
