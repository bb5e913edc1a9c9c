"""Rows of which several columns could say what the prompt is: decoding takes the one that is trained, or refuses."""

from __future__ import annotations

import json

import pytest

from megatron_dtrpo.data.prompts import prompt_notes, read_prompts
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError
from tests.support.chat_tokenizer import save_chat_tokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


ASK, YES, NO = [user("Is it cold?")], [assistant("Yes.")], [assistant("No.")]
CALL = assistant("", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {}}}])
BROKEN = {
    "of other messages": (ASK + YES, [user("Is it warm?"), *NO]),
    "that part at the user": ([*ASK, *YES, user("a"), *YES], [*ASK, *YES, user("b"), *NO]),
    "that hold no answer": (ASK, ASK),
    "without a role": ([{"content": "Hi"}], [{"content": "Ho"}]),
    "empty": ([], []),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    calls = "m.content + (m.tool_calls | tojson if m.tool_calls else '')"
    (folder / "chat_template.jinja").write_text(template.replace("m.content", calls), encoding="utf-8")
    return build_tokenizer("HuggingFaceTokenizer", folder)


@pytest.fixture
def outcomes(tmp_path, tokenizer):
    """The token ids of the prompt that SFT trains, that preferences train and that is decoded, with the notes of SFT
    and of decoding; or why not."""

    def of(row):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")

        def trained(kind):
            store = build_token_store(path, kind, tokenizer, tmp_path / "cache")
            return store[0].prompt.tolist(), list(store.notes)

        def decoded():
            prompts = read_prompts(path, tokenizer, 4096)
            return prompts[0].ids, prompt_notes(prompts)

        return [_attempt(path, read) for read in (lambda: trained("sft"), lambda: trained("preference"), decoded)]

    return of


def _attempt(path, read):
    try:
        return read()
    except UserError as error:
        assert "\n" not in str(error)
        return str(error).removeprefix(f"{path}:1: ")


@pytest.mark.parametrize(
    "behind",
    [
        [user("Sure?")],
        [user("Sure?"), user("Really?")],
        [{"role": "system", "content": "Be brief."}],
        [user("Sure?"), assistant("Quite.", weight=0)],
    ],
)
def test_messages_behind_the_last_answer_are_neither_learned_nor_asked(outcomes, tokenizer, behind):
    trained, _, decoded = outcomes({"messages": ASK + YES + behind})
    assert trained[0] == decoded[0] == tokenizer.encode_prompt(ASK) and trained[1] == decoded[1]
    (note,) = decoded[1]
    assert note.startswith("warning: 1 rows go on after the assistant's last answer: ") and note.endswith(":1)")
    assert "neither learned nor asked" in note and "call the column 'prompt'" in note


def test_a_call_is_an_answer(outcomes, tokenizer):
    """What follows it is the tool's reply, that the next answer reads."""
    trained, _, decoded = outcomes({"messages": [*ASK, CALL, {"role": "tool", "content": "-3"}]})
    assert trained == decoded and decoded[0] == tokenizer.encode_prompt(ASK)


def test_messages_behind_the_last_answer_are_asked_as_a_prompt(outcomes, tokenizer):
    turns = [*ASK, *YES, user("Sure?")]
    *_, decoded = outcomes({"prompt": turns})
    assert decoded == (tokenizer.encode_prompt(turns), [])


@pytest.mark.parametrize("behind", [[user("Sure?")], [user("Sure?"), assistant("Quite.", weight=0)]])
def test_the_answer_to_what_follows_is_not_that_of_the_prompt(outcomes, behind):
    """Exact match compared it with the answer to the question before."""
    trained, _, decoded = outcomes({"messages": ASK + YES + behind, "answer": "Quite."})
    assert trained == decoded and "'answer' may be that of what follows" in trained


@pytest.mark.parametrize("messages", [[assistant("Hi"), user("Is it cold?")], [*ASK, assistant("Yes.", weight=0)]])
def test_messages_whose_answers_cannot_be_learned_are_refused_alike(outcomes, messages):
    trained, _, decoded = outcomes({"messages": messages})
    assert isinstance(trained, str) and trained == decoded


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("columns", [{"messages": ASK + YES}, {"prompt": "Is it cold?", "completion": "Yes."}])
def test_columns_that_sft_does_not_read_spoil_no_prompt(outcomes, broken, columns):
    chosen, rejected = BROKEN[broken]
    trained, paired, decoded = outcomes({**columns, "chosen": chosen, "rejected": rejected})
    assert trained == decoded and isinstance(decoded, tuple) and isinstance(paired, str)


@pytest.mark.parametrize("messages", [[{"content": "Hi"}], [*ASK, assistant("Yes.", weight=0)], []])
def test_columns_that_preferences_do_not_read_spoil_no_prompt(outcomes, messages):
    trained, paired, decoded = outcomes({"messages": messages, "chosen": ASK + YES, "rejected": ASK + NO})
    assert paired == decoded and isinstance(decoded, tuple) and isinstance(trained, str)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (
            {"messages": [user("Why?"), *YES], "chosen": ASK + YES, "rejected": ASK + NO},
            "chosen and rejected and messages",
        ),
        (
            {"prompt": "Why?", "messages": ASK + YES, "chosen": "Yes.", "rejected": "No."},
            "chosen and rejected and messages",
        ),
        (
            {"prompt": "Why?", "completion": "So.", "chosen": ASK + YES, "rejected": ASK + NO},
            "chosen and rejected and prompt and completion",
        ),
    ],
)
def test_columns_of_two_prompts_are_refused_when_decoding(outcomes, row, names):
    trained, paired, decoded = outcomes(row)
    assert trained[0] != paired[0]
    assert decoded == f"{names} have different prompts; leave out the columns of one of them"


def test_weights_make_no_other_prompt(outcomes):
    asked = [user("Hi"), assistant("Hello"), *ASK]
    weighed = [user("Hi"), assistant("Hello", weight=0), *ASK]
    trained, paired, decoded = outcomes({"messages": weighed + YES, "chosen": asked + YES, "rejected": asked + NO})
    assert trained[0] == paired[0] == decoded[0]
