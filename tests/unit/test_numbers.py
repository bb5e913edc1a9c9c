"""Neighbours of numbers, judged by hand: other spellings are right, what means another number never is."""

from __future__ import annotations

import pytest

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.evaluation.verifiers import numeric

THIN, NARROW, FIXED = "\u2009", "\u202f", "\u00a0"
RIGHT = [
    # Groups of three digits with a space of any width between them.
    *(("1000", f"The total is 1{space}000.") for space in (" ", THIN, NARROW, FIXED, "\u2007")),
    *((f"1{space}000", "1000") for space in (" ", THIN, NARROW, FIXED)),
    ("1 000", "so 1 000 in all"),
    ("1 000 000", "1,000,000"),
    ("12345.5", "It is 12 345.5 m"),
    ("12 345.5", "12345.5"),
    ("-1 000", "it is \u22121 000"),
    ("$5 000", "5000"),
    ("5000", "\\boxed{5 000}"),
    ("5000", "Answer: 5 000 and no more"),
    ("5000", "#### 5 000"),
    ("#### 5 000", "5000"),
    ("300", "in 2024 300 people came"),
    ("300", "on 5 May 2024 300"),
    ("5", "5 000 and 5"),
    ("1000.5", "1,000.5"),
    ("1000000", "1 000 000"),
    # One number in other spellings.
    ("1e3", "1 000"),
    ("1000", "1e3"),
    ("1/2", "\u00bd"),
    ("\u00bd", "0.5"),
    ("-5", "\u22125"),
    ("5%", "5 %"),
    ("$5", "5"),
    ("5", "$5"),
    ("5", "5 dollars"),
    ("5", "x = 5"),
    ("5", "x=5."),
    ("5", "\\boxed{5}"),
    ("\\boxed{5}", "5"),
    ("5", "**5**"),
    ("**5**", "5"),
    ("5", "5."),
    ("5", "(5)"),
    ("5", "<answer>5</answer>"),
    ("5", "=> 5"),
    ("5", "-> 5"),
    ("5/1", "5"),
    ("5", "10/2"),
    ("5", "The answer is 5!"),
    ("5", "\uff15"),
    ("15", "\u0661\u0665"),  # Arabic digits
    ("3.5", "\u0663\u066b\u0665"),
    ("1000", "\u0661\u066c\u0660\u0660\u0660"),
    ("12", "\u0967\u0968"),  # Devanagari
    ("90", "it is 90^\\circ."),
    ("5", "Step 1: 5"),
    ("5", "It grew from 3 to 5"),
    ("2.5", "2 \\frac{125}{250}"),
    ("6", "3 + 3 = 6"),
    ("3", "log_2(8) = 3"),
    ("5", "not 4 but 5"),
    ("60", "12 times 5 is 60"),
    ("6", "2 * 3 = 6"),
    ("20", "5% of 400 is 20"),
    ("5", "a wall of 5m"),
]
WRONG = [
    # Parts of a number in groups.
    ("0", "1 000"),
    ("500", "the total is 9 500"),
    ("9", "the total is 9 500"),
    ("345", "12 345"),
    ("2024300", "in 2024 300 people came"),
    ("5000", "5 0000"),
    ("5000", "5 00 0"),
    ("0", "1 00 000"),
    ("100000", "1,00,00"),
    ("1000", "1.000,5"),
    ("5", "1.000,5"),
    ("1000", "1.000"),
    ("1.5", "1 125/250"),
    ("0", "1_000"),
    ("1", "1_000"),
    ("0", "1\u2019000"),
    ("1", "1\u2019000"),
    ("5", "\u0663\u066b\u0665"),
    # Signs and words beside it.
    ("5", "\u22125"),
    ("5", "Answer: \u20135"),
    ("5", "minus 5"),
    ("5", "negative 5"),
    ("5", "x > 5"),
    ("5", "x<5"),
    ("5", "x \u2260 5"),
    ("5", "x \\neq 5"),
    ("5", "it is more than 5"),
    ("5", "it is not 4 but isn't 5"),
    ("5", "rather than 5"),
    ("6", "5 or 6"),
    ("5", "Answer: 5 or 6"),
    ("5", "It takes 3 to 5 days"),
    ("7", "5 out of 7"),
    ("3", "5 : 3"),
    ("7", "5 (mod 7)"),
    ("7", "5 \\pmod{7}"),
    ("20", "it is 5% of 20"),
    # Another number by what stands at it.
    ("5", "5\u4e07"),
    ("5", "5 lakh"),
    ("5", "5 crore"),
    ("5", "5 Millionen"),
    ("5", "5bn"),
    ("5", "5\u2030"),
    ("3", "5 \\cdot 10^{3}"),
    ("10", "5 \\cdot 10^{3}"),
    ("10", "5 * 10^3"),
    ("5", "10\u2075"),
    ("2", "so it is 9 * 2"),
    ("2", "so it is 9 \u00d7 2"),
    ("5", "3\u00b75"),
    ("0", "0x10"),
    ("10", "0x10"),
    ("5", "sqrt(5)"),
    ("5", "the square root of 5"),
    ("5", "log 5"),
    ("8", "log_2(8)"),
    ("12", "5 times 12"),
    ("5", "f(5)"),
    ("3", "x_3"),
    ("3", "x_{3}"),
    ("5", "\\boxed{5!}"),
    ("5", "\\boxed{5n}"),
    ("-5", "\\boxed{|-5|}"),
    ("5", "five"),
    ("5", "V"),
    ("5", "$5 million"),
    ("5", "5 thousand"),
    ("5", "5 Million"),
    ("5", "5M"),
]
REFUSED = [
    "1 00",
    "1 0000",
    "1 000,5",
    "1.000,5",
    "0 500",
    "12 34",
    "five",
    "5 apples",
    "1 125/250",
    "1 000 00",
    "1  000",
]


@pytest.mark.parametrize(("answer", "completion"), RIGHT)
def test_the_same_number(answer, completion):
    assert numeric({"answer": answer}, completion)


@pytest.mark.parametrize(("answer", "completion"), WRONG)
def test_another_number(answer, completion):
    assert not numeric({"answer": answer}, completion)


@pytest.mark.parametrize("answer", REFUSED)
def test_an_answer_that_may_be_several_numbers_is_refused(answer):
    with pytest.raises(UserError, match="is not one number"):
        numeric({"answer": answer}, answer)
