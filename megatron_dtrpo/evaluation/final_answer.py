"""Numbers as people and models write them: one number in an ``answer`` column, and the number that a text ends in.

Reading is exact (fractions, no floating point) and strict: what is not certainly one number is none.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any, NamedTuple


class Number(NamedTuple):
    """An exact value; ``percent`` where a percent sign follows it."""

    value: Fraction
    percent: bool = False

    def equals(self, other: Number) -> bool:
        """Whether both mean one number. ``50%`` is 50 and 0.5; two numbers with the sign, or without, must agree."""
        if self.percent == other.percent:
            return self.value == other.value
        percent, plain = (self, other) if self.percent else (other, self)
        return plain.value in (percent.value, percent.value / 100)


# Groups of three digits; or, as in India, of two in front of the last three: 12,34,567.
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|(?!0)\d{1,2}(?:,\d\d)+,\d{3}|\d+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{{1,3}})?"
_ONE = re.compile(
    rf"(?P<sign>[+-]?)(?:(?:(?P<mixed>{_WHOLE})\s+)?(?P<top>{_WHOLE})/(?P<bottom>{_WHOLE})|(?P<decimal>{_DECIMAL}))(?P<percent>%?)"
)
_LONGEST = 200  # characters of a number; Python reads no integer of more than 4300 digits
# In a text: the longest run that looks like a number, readable or not, so that 10:30 is not read as 30.
_RUN = re.compile(
    rf"(?:(?<![\w.)\]}}])[+-])?(?:(?<![\w.])|(?<=[^\W\d_]\.)(?=\d))(?:{_WHOLE}\s+\d+/\d+|\.?\d(?:[\d.,:/^]*\d)?(?:[eE][+-]?\d+)?)(?![\d/^:]\d)%?"
)
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b")
_MULTIPLE = (
    r"(?i:hundred|thousand|[mb]illi(?:on|ard)\w*|trillion\w*|dozen|lakhs?|crores?|mille?|mio|mrd)\b|[mbt]n\b"
    r"|[\u4e07\u842c\u5343\u767e\u4ebf\u5104\u5146]"
)
_COINS = r"(?i:dollars?|euros?|pounds?)\s+and\s+"
_POWERS = r"\u00b2\u00b3\u00b9\u2070-\u209c"
_TIMES = r"(?:[*^\u00d7\u00b7\u22c5\u00f7]|\s:|\\(?:cdot|times|div)\b|\s+(?:times|multiplied by|divided by)\b)"
# Beside a number, these make another of it, or say that it is not the one; which one it is then is not read.
_BEHIND = (
    r"[xyziIOokKMB]\b|[^\W\d_]+\d|_[\w{]|['\u2019]\d",  # 5x, 1O, 0x10, 1_000, 1'000
    rf"\s*(?:{_MULTIPLE}|[\u221a\u03c0\u00b1\u2030{_POWERS}]|\\(?:sqrt|pi|pm)\b)",
    r"\s*\^(?!\s*\{?\\circ)",
    rf"\s*[\u2013\u2014]\s*\d|\s+(?:to|or)\s+\d|\s*{_COINS}\d",
)
_BEFORE = (
    r"\u221a|\u00b1|\\pm|\\sqrt\s*(?:\[\d+\])?\s*\{?|\\[cdt]?frac\s*\{[^{}]*|\\[cdt]?frac\s*\{[^{}]*\}\s*\{[^{}]*",
    r"\b(?:sqrt|log(?:_\w+)?|ln|exp|sin|cos|tan|abs)\b\s*\(?|\b[a-z]\(|\b(?:root|half|twice|square|cube) of|%\s*of",
    r"[\w)]\s*[\^_]\s*\{?|\b\\?p?mod(?:ulo)?\b\s*\{?",
    rf"\d\}}?\s*{_TIMES}",
    r"\b(?:not|never|rather than|instead of|(?:more|less|fewer|greater) than|out of|minus|negative)|n['\u2019]t",
    r"(?:\s|^|(?<![\w</])\w)[<>]=?|[\u2260\u2264\u2265]|\\(?:neq?|leq?|geq?|lt|gt)\b",
    rf"\bbetween\s+\S+\s+and|\d\s+or|(?<!from )\b\d+\s+to|\d\s+{_COINS}",
)
_CHANGED_BEHIND = re.compile("|".join(_BEHIND))
_CHANGED_BEFORE = re.compile(rf"(?:{'|'.join(_BEFORE)})\s*$|\d['\u2019]$|[\u2010-\u2014]$", re.IGNORECASE)
# Beside such a group are others of a number that is grouped in another way: 12 34 567, 1,234 567, 1 00 000.
_GROUP_BEFORE, _GROUP_BEHIND = re.compile(r"(?<!\d)\d{1,3} $"), re.compile(r" (?:\d\d )*\d{3}(?!\d)")
_FIRST_GROUP, _LAST_GROUP = re.compile(r"\d{3}(?!\d)"), re.compile(r"(?<!\d)\d{1,3}$")

_LATEX_FRACTION = re.compile(r"(?:(\d)\s*)?\\[cdt]?frac\s*(?:\{\s*(-?[\d,]+)\s*\}\s*\{\s*([\d,]+)\s*\}|(\d)\s*(\d))")
_LATEX_UNIT = re.compile(rf"\\(?:text|mathrm|mbox)\s*\{{(?!\s*{_MULTIPLE})[^{{}}]*\}}\s*$|\^\s*\{{?\\circ\}}?\s*$")
# Groups of thousands behind one to three digits; with a fraction behind them they may be a mixed number as well.
_SPACES = " \u00a0\u2007-\u2009\u202f"
_GROUPED = re.compile(
    rf"(?<![\w.,])(?<!\d[{_SPACES}])[1-9]\d{{0,2}}(?:[{_SPACES}]\d{{3}})+(?![\d]|,\d)(?P<over>\s?[/\u2044]\s?\d)?"
)
_PLAIN = {
    "\u2212": "-",
    "\ufe63": "-",
    "\uff0d": "-",
    "{,}": ",",
    "\\!": "",
    "\\,": "",
    "\\$": "$",
    "\\%": "%",
    "\u2044": "/",
    "\u066b": ".",  # Arabic signs
    "\u066c": ",",
    "\u066a": "%",
}
_CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"
_CURRENCY_WORD = re.compile(
    r"(?:\b(?:Rs|INR|USD|EUR|GBP|JPY|CNY|RMB|CHF|CAD|AUD)\.?|\b(?:US|CA|AU|NZ|HK|NT|[ACRS])(?=\$))"
    rf" ?(?=[{_CURRENCY}]?\d)",
    re.IGNORECASE,
)
_WIDE = re.compile("[\uff01-\uff5e]")  # digits and signs as wide as Chinese characters
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")


def _plain(text: str) -> str:
    """``text`` with one spelling of each sign, minus and fractions included; without currency and emphasis."""
    text = re.sub(
        "[\u00bc-\u00be\u2150-\u215e\u2189]", lambda match: " " + unicodedata.normalize("NFKC", match[0]), text
    )
    text = _WIDE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), _INVISIBLE.sub("", text))
    for written, plain in _PLAIN.items():
        text = text.replace(written, plain)
    text = _GROUPED.sub(lambda match: re.sub(f"[{_SPACES}]", "/" if match["over"] else ",", match[0]), text)
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text))
    text = _LATEX_FRACTION.sub(_slashed, text)
    text = re.sub(r"(?<=\d) and (?=\d+/\d)", " ", re.sub(r"(?<=\d) ?/ ?(?=\d)", "/", text))
    text = re.sub(r"\*\*|__|`|\\\(|\\\)|\\\[|\\\]", "", text)
    text = re.sub(r"(?<=\d)/-(?!\w)", "", _CURRENCY_WORD.sub("", text))  # as rupees are written
    return re.sub(rf"\s*[{_CURRENCY}](?=\s|[.,;:!?)]|$)|[{_CURRENCY}]", "", text)


def _slashed(match: re.Match) -> str:
    whole, *parts = match.groups()
    top, bottom = [part for part in parts if part is not None]
    return f"{whole} {top}/{bottom}" if whole else f"{top}/{bottom}"


def _value(plain: str) -> Number | None:
    """The number that a text of one spelling is, sign first; None where it is anything else."""
    match = _ONE.fullmatch(plain) if len(plain) <= _LONGEST else None
    if not match:
        return None
    number = {name: part.replace(",", "") for name, part in match.groupdict().items() if part is not None}
    if "decimal" in number:
        value = Fraction(number["decimal"])
    elif int(number["bottom"]) == 0:
        return None
    else:
        value = int(number.get("mixed", 0)) + Fraction(int(number["top"]), int(number["bottom"]))
    return Number(-value if number["sign"] == "-" else value, bool(number["percent"]))


def read_number(text: str) -> Number | None:
    """The one number that the whole of ``text`` is: an integer, a decimal, a simple or mixed fraction, in plain text or
    LaTeX, with separators of thousands, a currency or a percent sign; None for everything else."""
    text = _LATEX_UNIT.sub("", text.strip())
    return _value(re.sub(r"\s*%$", "%", _plain(text).strip().removesuffix(".").strip()))


def _runs(plain: str) -> list[re.Match]:
    """Words that look like a number in a text of one spelling; ``3rd`` is none."""
    return [run for run in _RUN.finditer(plain) if not _ORDINAL.match(plain, run.end())]


def _run_value(run: re.Match) -> Number | None:
    """The number of one of `_runs`; None where what stands beside it makes another of it."""
    before = run.string[: run.start()][-_LONGEST:]
    if _CHANGED_BEHIND.match(run.string, run.end()) or _CHANGED_BEFORE.search(before):
        return None
    if _FIRST_GROUP.match(run[0]) and _GROUP_BEFORE.search(before):
        return None
    if _LAST_GROUP.search(run[0]) and _GROUP_BEHIND.match(run.string, run.end()):
        return None
    return _value(run[0])


_BRACE = re.compile(r"\\[{}]|(?P<box>\\f?box(?:ed)?\s*\{)|(?P<open>\{)|(?P<close>\})")


def last_boxed(text: str) -> str | None:
    """The content of the last complete ``\\boxed{...}`` holds."""
    opened: list[int | None] = []  # where the content of a box begins; None for another brace
    last, content = -1, None
    for match in _BRACE.finditer(text):
        if match["box"] or match["open"]:
            opened.append(match.end() if match["box"] else None)
        elif match["close"] and opened:
            start = opened.pop()
            if start is not None and start > last:
                last, content = start, text[start : match.start()]
    return content


def _boxed_number(content: str) -> Number | None:
    content = content.rpartition("=")[2]
    number = read_number(content)
    if number is not None:
        return number
    plain = _plain(_LATEX_UNIT.sub("", content))
    runs = _runs(plain)
    words_only = not re.search(r"[\\^*+|!]|\d\s*-\s*\d|\d[a-zA-Z]\b", plain)
    return _run_value(runs[0]) if len(runs) == 1 and words_only else None


_HASHES = re.compile(r"####[ \t]*")
# "2. Add both" behind ####, with more lines below it, is the heading of a step.
_HEADING = re.compile(r"\d+[.):]\s+\S[^\n]*\n\s*\S")
_ANSWER = re.compile(
    r"\banswer\s*(?:(?:is|was|equals|=|:)[:\s]*)+(?:(?:equal to|approximately|about|exactly|just|simply)\s+)?[\s(\[{]*",
    re.IGNORECASE,
)


def _marked(plain: str, marker: re.Pattern) -> Any:
    """The number right behind the last ``marker`` that has one, or None; ``""`` where none has."""
    for match in reversed(list(marker.finditer(plain))):
        start = match.end()
        run = _RUN.match(plain, start)
        if not run or (marker is _HASHES and _HEADING.match(plain, start)):
            continue
        # "9 * 2 = 18": the right-hand side of the sentence's last equation.
        sentence = re.split(r"\n|[.;!?](?:\s|$)", plain[start:], maxsplit=1)[0]
        if "=" in sentence:
            start += sentence.rindex("=") + 1
            run = _RUN.match(plain, start + len(sentence) - len(sentence.lstrip())) or _RUN.search(plain, start)
        if run is None or re.match(r"\s*(?:[*/^+\u00d7\u00b7]|-\s*\d)", plain[run.end() :]):
            return None
        return _run_value(run)
    return ""


def final_number(text: str) -> Number | None:
    """The number that a text gives as its answer; None where it gives none.

    The first of these that the text has decides: the last ``\\boxed{...}``, the last ``####`` with a number behind it,
    the last ``answer is`` or ``answer:`` with a number right behind it, the last number of all.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return _boxed_number(boxed)
    plain = _plain(text)
    for marker in (_HASHES, _ANSWER):
        found = _marked(plain, marker)
        if found != "":
            return found
    runs = _runs(plain)
    return _run_value(runs[-1]) if runs else None
