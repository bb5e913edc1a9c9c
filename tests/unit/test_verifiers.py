"""The built-in verifier, and what becomes of users' own."""

from __future__ import annotations

from decimal import Decimal

import pytest

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.evaluation.verifiers import Judge, final_number, load_verifier, numeric


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("37+58=95, 95-6=89. Answer: 89", 89),
        ("He has 3 left.\n#### 1,234", 1234),
        ("#### 5 apples out of 7", 5),
        ("The answer is $12.50.", "12.5"),
        ("so \\boxed{-7} it is, in 3 steps", -7),
        ("first Answer: 1, no, Answer: 2", 2),
        ("there are 4 and then 9.", 9),
        ("no number here", None),
        ("", None),
        (".5", "0.5"),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_numeric_compares_numbers_and_not_text():
    assert numeric({"answer": "reasoning 1 2 3 #### 1,000"}, "so 1000.0")
    assert not numeric({"answer": 5}, "so 6")
    assert not numeric({"answer": 5}, "no idea")
    with pytest.raises(UserError, match="'answer'"):
        numeric({}, "5")
    with pytest.raises(UserError, match="no number"):
        numeric({"answer": "none"}, "5")


def test_users_verifier_is_found_and_its_exceptions_are_counted(tmp_path, monkeypatch):
    (tmp_path / "my_verifier.py").write_text(
        "def short(row, text):\n    if 'boom' in text:\n        raise ValueError('no boom please')\n"
        "    return len(text) < row['most']\n"
    )
    monkeypatch.chdir(tmp_path)
    judge = Judge(load_verifier("my_verifier:short"))
    assert judge({"most": 3}, "x:1", "ab") is True
    assert judge({"most": 3}, "x:2", "abcd") is False
    assert judge({"most": 3}, "x:3", "boom") is None
    assert judge({}, "x:4", "ab") is None
    assert judge.failures == [
        "x:3: the verifier raised ValueError: no boom please",
        "x:4: the verifier raised KeyError: 'most'",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("numerical", "give numeric, or module:function"),
        ("no_such_module_at_all:f", "no module"),
        ("json:no_such", "has no 'no_such'"),
        ("math:pi", "is not a function"),
    ],
)
def test_unusable_verifiers(name, message):
    with pytest.raises(UserError, match=message):
        load_verifier(name)
