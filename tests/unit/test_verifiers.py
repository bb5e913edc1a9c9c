"""The built-in verifier, and what becomes of users' own."""

from __future__ import annotations

import importlib.util
import json
import random
import threading

import pytest

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.evaluation import formulas
from megatron_dtrpo.evaluation.verifiers import Judge, load_verifier, numeric

# (answer, completion), judged by hand.
RIGHT = [
    ("3/4", "She ate 3/4 of it."),
    ("3/4", "0.75"),
    ("3/4", "\\boxed{\\frac{3}{4}}"),
    ("3/4", "So \\dfrac34."),
    ("2 1/2", "Answer: 2.5"),
    ("2 1/2", "Answer: 2 1/2"),
    ("2 1/2", "\\boxed{2\\frac{1}{2}}"),
    ("2 1/2", "It is 2\xbd hours"),
    ("2\xbd", "5/2"),
    ("9500", "the total is 9{,}500"),
    ("9{,}500", "9,500"),
    ("9500", "$9\\,500$"),
    ("9500", "9\u202f500"),
    ("-5", "so it is \u22125."),
    ("\u22125", "Answer: -5"),
    ("-5", "x = -5"),
    ("5", "pages 4-5"),
    ("3", "16 - 3"),
    ("42", "Final answer: **42**. It took 3 steps."),
    ("42", "**Final Answer:** 42\n\nI used 3 steps"),
    ("42", "**Answer**: $42$ in 3 ways"),
    ("12", "Answer 1: there are 5 red ones. In total 12"),
    ("18", "The answer is 9 * 2 = 18."),
    ("18", "The answer is $9 \\times 2 = 18$ dollars, 3 more"),
    ("18", "#### 18"),
    ("18", "so 9\n#### $18\n"),
    ("18", "#### 18 of 20"),
    ("12", "#### 2. Add both\nThe total is 12"),
    ("#### 18", "A: 18"),
    ("He has 3.\n9*2=<<9*2=18>>18\n#### 18", "The answer is 18"),
    ("50%", "50"),
    ("50", "50 %"),
    ("0.5", "50%"),
    ("50%", "\\boxed{50\\%}"),
    ("0.5", "0.5%"),
    ("$1,234.50", "1234.5 dollars"),
    ("1234", "1,234"),
    ("12", "It costs \u20ac12."),
    ("12", "It costs 12\u20ac."),
    ("5", "\\boxed{x = 5}"),
    ("5", "\\boxed{5 \\text{ apples}} of 7"),
    ("6", "\\boxed{5}, no, \\boxed{6}"),
    ("7", "so \\boxed{7"),
    ("7", "\\boxed{\\boxed{7}}"),
    ("5", "\\boxed{5 apples}"),
    ("5", "She has 5 apples after the 3rd day."),
    ("18", "a total of 18km."),
    ("8", "8"),
    ("8", "8.0"),
    ("1e3", "1000"),
    (5, "5"),
    (5.5, "5.5"),
    (-2, "-2"),
    ("5.", "5"),
    ("18", "answer: Janet makes $18 every day"),
    ("12\\text{ cm}", "12"),
    ("90^\\circ", "90"),
    ("+5", "5"),
    (".5", "0.50"),
    ("-1/2", "-0.5"),
    ("-2 1/2", "-2.5"),
    ("1000000", "1,000,000"),
    ("3", "1, 2, 3"),
    ("-3/4", "\\boxed{\\frac{-3}{4}}"),
    ("3/4", "so \\cfrac{3}{4}"),
    ("3/4", "The answer is 3 / 4."),
    ("2 1/2", "It is 2 and 1/2 hours"),
    ("5", "The answer is 5 meters"),
    ("5", "\\boxed{5 \\text{ m}}"),
    ("10", "He is not late. The answer is 10"),
]
WRONG = [
    ("3/4", "There are 4."),
    ("3/4", "Answer: 3"),
    ("2 1/2", "Answer: 2"),
    ("2 1/2", "Answer: 1"),
    ("9", "the total is 9{,}500"),
    ("500", "the total is 9{,}500"),
    ("5", "so it is \u22125."),
    ("-5", "pages 4-5"),
    ("-3", "16 - 3"),
    ("3", "Final answer: **42**. It took 3 steps."),
    ("1", "Answer 1: there are 5 red ones. In total 12"),
    ("5", "Answer 1: there are 5 red ones. In total 12"),
    ("9", "The answer is 9 * 2 = 18."),
    ("9", "The answer is 9 * 2"),
    ("2", "The answer is 9 * 2"),
    ("2", "#### 2. Add both\nThe total is 12"),
    ("5000", "50%"),
    ("234", "1,234"),
    ("0.333", "1/3"),
    ("10", "at 10:30"),
    ("30", "at 10:30"),
    ("16", "it is 2^4"),
    ("4", "it is 2^4"),
    ("2020", "on 5/6/2020"),
    ("5", "so 2,5"),
    ("25", "so 2,5"),
    ("5", "\\boxed{5, 6}"),
    ("6", "\\boxed{5, 6}"),
    ("5", "\\boxed{5}, no, \\boxed{6}"),
    ("7", "\\boxed{A} 7"),
    ("5", "\\boxed{5x}"),
    ("3", "\\boxed{2^3}"),
    ("5", "\\boxed{5\\sqrt{2}}"),
    ("5", "\\boxed{\\sqrt{5}}"),
    ("5", "\\boxed{5\\pi}"),
    ("5", "we get 5x"),
    ("2", "H2O weighs"),
    ("8", "no idea"),
    ("8", ""),
    ("1", "1, 2, 3"),
    # What stands beside a number and makes another of it.
    ("4", "The answer is 4 million"),
    ("4", "It costs $4 billion."),
    ("4", "so 4k"),
    ("4", "\\boxed{4 \\text{ million}}"),
    ("4", "4 dozen"),
    ("4", "The answer is 3 / 4"),
    ("4", "\\boxed{\\frac{-3}{4}}"),
    ("4", "so \\frac{x}{4}"),
    ("4", "so \\frac{\\pi}{4}"),
    ("4", "so \\frac{4}{x}"),
    ("4", "so \\frac{3.5}{4}"),
    ("4", "so \\cfrac{3}{4}"),
    ("1/2", "It is 2 and 1/2 hours"),
    ("9", "it is \u221a9"),
    ("9", "so \\sqrt{9}"),
    ("9", "so \\sqrt9"),
    ("2", "The answer is 2\u221a3"),
    ("3", "The answer is 2\u221a3"),
    ("4", "The answer is 4\u03c0"),
    ("4", "The answer is 4\\sqrt{2}"),
    ("4", "The answer is 4\u00b2"),
    ("4", "\\boxed{4i}"),
    ("3", "Answer: 3\u20135"),
    ("3", "Answer: 3 to 5"),
    ("3", "Answer: 3\u00b11"),
    ("1", "it is 3\u00b11"),
    ("10", "The answer is not 10"),
    ("6", "the answer is not 6"),
    ("12", "between 10 and 12"),
    ("1", "The answer is 1O"),
    ("234", "it is 1'234"),
    ("1", "Answer: 1'234"),
    ("18", "The answer is 18 dollars and 50 cents"),
    ("50", "It costs 18 dollars and 50 cents"),
]
NOT_ONE_NUMBER = [
    "5 or 6",
    "5 apples out of 7",
    "",
    "none",
    "1/0",
    "2,5",
    "1,23,4",
    "10:30",
    "nan",
    "inf",
    True,
    [5],
    "3 4",
    "\\boxed{}",
    "5 pi",
    "#### 3 or 4",
    "16 - 3",
    float("nan"),
]

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="pip install math-verify"
)


@pytest.mark.parametrize(("answer", "completion"), RIGHT)
def test_right(answer, completion):
    assert numeric({"answer": answer}, completion)


@pytest.mark.parametrize(("answer", "completion"), WRONG)
def test_wrong(answer, completion):
    assert not numeric({"answer": answer}, completion)


@pytest.mark.parametrize("answer", NOT_ONE_NUMBER)
def test_an_answer_that_is_not_one_number_is_refused(answer):
    """Whatever the response: even its own text must not become a right answer."""
    for completion in (str(answer), "5", "3 4"):
        with pytest.raises(UserError, match="'answer'"):
            numeric({"answer": answer}, completion)


def test_refused_rows_are_named():
    judge = Judge(numeric)
    assert judge({"answer": "5 or 6"}, "problems.jsonl:7", "5") is None
    assert judge({}, "problems.jsonl:8", "5") is None
    assert judge.failures[0].startswith("problems.jsonl:7: its 'answer' is not one number: '5 or 6'; give one number")
    assert judge.failures[1] == "problems.jsonl:8: the row has no 'answer' to compare with"


def test_a_long_response_is_judged_at_once():
    """Text that a model repeats to its limit; patterns that search it again from every place would need minutes."""
    for text in (
        "answer is " + " " * 10**5,
        "\\boxed{" * 10**4,
        "9" * 10**5,
        "1." * 10**5,
        "$" * 10**5,
        "\\frac" * 10**4,
    ):
        assert not numeric({"answer": 7}, text)


def test_gsm8k_solutions_are_told_apart(shared_dir):
    """Every correct solution is right and every incorrect one wrong, by the answer behind the correct one's mark."""
    for line in (shared_dir / "data" / "gsm8k_preferences.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        row["answer"] = row["chosen"].rpartition("A:")[2].strip()
        assert numeric(row, row["chosen"]) and not numeric(row, row["rejected"]), row


def test_gsm8k_answers_may_be_whole_solutions(shared_dir):
    rows = map(json.loads, (shared_dir / "data" / "gsm8k_sft.jsonl").open(encoding="utf-8"))
    for row in rows:
        assert numeric({"answer": row["completion"]}, row["completion"]), row


# --- formulas

FORMULAS = [
    ("\\sqrt{2}", "\\boxed{\\sqrt 2}", True),
    ("\\sqrt{2}", "so it is $2^{1/2}$.", True),
    ("\\sqrt{2}", "\\boxed{2}", False),
    ("x + 1", "\\boxed{1 + x}", True),
    ("(1, 2)", "\\boxed{(1, 2)}", True),
    ("(1, 2)", "\\boxed{(2, 1)}", False),
    ("\\frac{\\pi}{2}", "\\boxed{\\pi/2}", True),
    ("5\\pi", "\\boxed{5}", False),
    ("Expand.\n#### 2^4", "\\boxed{16}", True),
    ("\\boxed{\\infty}", "\\boxed{\\infty}", True),
]


@needs_math_verify
def test_formulas_are_judged_by_math_verify_in_any_order_and_thread():
    verdicts: dict[int, list] = {n: [] for n in range(len(FORMULAS))}

    def judge_all(seed: int) -> None:
        for n in random.Random(seed).sample(range(len(FORMULAS)), len(FORMULAS)):
            verdicts[n].append(numeric({"answer": FORMULAS[n][0]}, FORMULAS[n][1]))

    judge_all(0)
    threads = [threading.Thread(target=judge_all, args=[seed]) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {n: [expected] * 3 for n, (_, _, expected) in enumerate(FORMULAS)}


@needs_math_verify
def test_a_formula_that_is_too_large_to_compute_is_not_judged(monkeypatch):
    formulas._judge.cache_clear()
    monkeypatch.setattr(formulas, "SECONDS", 1)
    with pytest.raises(UserError, match="no verdict within 1 s"):
        numeric({"answer": "\\sqrt{2}"}, "\\boxed{9^{9^{9^9}}}")
    assert numeric({"answer": "\\sqrt{2}"}, "\\boxed{\\sqrt{2}}"), "the next one is judged by a new process"
    formulas._judge.cache_clear()


def test_formulas_are_refused_without_math_verify(monkeypatch):
    monkeypatch.setattr(formulas.importlib.util, "find_spec", lambda name: None)
    for answer, completion, _ in FORMULAS:
        with pytest.raises(UserError, match="pip install math-verify"):
            numeric({"answer": answer}, completion)


# --- users' own


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


def test_an_evaluation_says_what_it_could_not_judge(monkeypatch, capsys):
    """It counts as wrong, as any answer that is not accepted."""
    from types import SimpleNamespace

    from megatron_dtrpo.config.settings import Config
    from megatron_dtrpo.data.prompts import Prompt
    from megatron_dtrpo.data.tokenizer import build_tokenizer
    from megatron_dtrpo.diffusion.decoding import Completion
    from megatron_dtrpo.evaluation import periodic

    rows = [{"answer": "two"}, {"answer": 2}]
    problems = [Prompt(row, f"row {number}", "x", [120], "x") for number, row in enumerate(rows)]
    completion = Completion(list(b"2"), [0], [1.0], [0], 1, False, [])
    monkeypatch.setattr(periodic, "decode_prompts", lambda *args, **settings: [[completion]] * 2)
    evaluation = periodic.AnswerEvaluation(Config(), build_tokenizer("ByteLevelTokenizer"), problems)
    for is_main in (True, False):
        assert evaluation._decoded(SimpleNamespace(is_main=is_main))["exact_match"] == 0.5
        said = capsys.readouterr().err
        assert ("row 0: its 'answer' is not one number" in said) == is_main
        assert said.endswith("1 responses could not be judged and count as wrong\n" * is_main)
