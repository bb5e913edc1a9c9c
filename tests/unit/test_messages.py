"""What messages hold beside plain words: end tokens, thoughts, keys of other programs, weights."""

from __future__ import annotations

import json

import pytest

from megatron_dtrpo.data.prompts import make_prompt
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError
from tests.support.chat_tokenizer import save_chat_tokenizer

END = "<|im_end|>"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def user(content, **keys):
    return {"role": "user", "content": content, **keys}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def call(content, city):
    function = {"name": "weather", "arguments": {"city": city}}
    return assistant(content, tool_calls=[{"type": "function", "function": function}])


def tool(content):
    return {"role": "tool", "content": content}


QUESTION = [user("Is it cold in Oslo?")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return build_tokenizer("HuggingFaceTokenizer", folder)


@pytest.fixture(scope="module")
def sdar(shared_dir):
    return build_tokenizer("HuggingFaceTokenizer", shared_dir / "data" / "sdar_1_7b_chat", eos_token=END)


@pytest.fixture(scope="module")
def fast_dllm(shared_dir):
    return build_tokenizer("HuggingFaceTokenizer", shared_dir / "data" / "fast_dllm_v2_7b", eos_token=END)


@pytest.fixture
def store_of(tmp_path):
    def build(rows, tokenizer, kind="sft", **settings):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return build_token_store(path, kind, tokenizer, tmp_path / "cache", **settings)

    return build


def learned(tokenizer, example, response=0) -> list[str]:
    ids = example.responses[response]
    return [tokenizer._library.decode(ids[begin:end]) for begin, end in example.turns[response]]


def refused(build) -> str:
    with pytest.raises(UserError) as caught:
        build()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- end tokens


@pytest.mark.parametrize(
    ("first", "written"),
    [
        (call(f"I look{END} it up", "Oslo"), f"I look{END} it up"),
        (call(None, f"Oslo{END} or Bergen"), f"Oslo{END} or Bergen"),
        (call(f"{END}", f"{END}{END}"), f"{END}{END}"),
        ({**call("Well", "Oslo"), "reasoning_content": f"a{END}b"}, f"a{END}b"),
    ],
)
def test_an_end_token_inside_a_call_drops_nothing_and_is_counted(tokenizer, store_of, first, written):
    plain = {"prompt": QUESTION, "completion": [call("Well", "Oslo"), tool("-3"), assistant("Yes.")]}
    row = {"prompt": QUESTION, "completion": [first, tool("-3"), assistant("Yes.")]}
    store = store_of([plain, row], tokenizer)
    spoken = learned(tokenizer, store[1])
    assert len(spoken) == 2 and written in spoken[0] and spoken[0].endswith(f"</call>{END}")
    assert spoken[1] == f"Yes.{END}" and "-3" not in "".join(spoken)
    (note,) = store.notes
    assert "have text behind an end token inside an answer" in note and note.endswith(":2)")
    whole = tokenizer._library.apply_chat_template([*QUESTION, *row["completion"]], tokenize=False).rstrip()
    assert tokenizer._library.decode([*store[1].prompt, *store[1].responses[0]]) == whole


def test_an_end_token_in_what_an_answer_reads_is_counted(tokenizer, store_of):
    rows = [
        {"prompt": QUESTION, "completion": [call(None, "Oslo"), tool(reply), assistant("Yes.")]}
        for reply in ("-3", f"-3{END}, windy")
    ]
    store = store_of(rows, tokenizer)
    assert learned(tokenizer, store[0]) == learned(tokenizer, store[1])
    (note,) = store.notes
    assert "have an end token inside a message that an answer reads" in note and note.endswith(":2)")


def test_the_head_that_a_template_writes_behind_every_conversation_is_not_learned(tokenizer, store_of, monkeypatch):
    """LLaDA's writes the next message's head whether it is asked to or not."""
    template = TEMPLATE.replace("{% if add_generation_prompt %}", "{% if true %}")
    monkeypatch.setattr(tokenizer._library, "chat_template", template)
    exchange = [call(None, "Oslo"), tool("-3"), assistant("Yes.")]
    store = store_of([{"prompt": QUESTION, "completion": each} for each in (exchange[2:], exchange)], tokenizer)
    assert learned(tokenizer, store[0]) == [f"Yes.{END}"] and store.notes == ()
    assert learned(tokenizer, store[1])[0].endswith(f"</call>{END}")
    assert learned(tokenizer, store[1])[1:] == [f"Yes.{END}"]


# --- thoughts


@pytest.mark.parametrize(
    "answer",
    ["It is far north.\n</think>\n\nYes.", "It is far north, so yes", "\nhm</think>Yes.", "a<think>b</think>c"],
)
@pytest.mark.parametrize("begun", ["<think>\n", "<think>", "<think>\nOslo lies", "Well. <think>\n"])
def test_a_thought_that_the_prompt_begins_is_continued(sdar, fast_dllm, store_of, begun, answer):
    """Training refused such rows, decoding wrote an empty thought in front."""
    for tokenizer in (sdar, fast_dllm):
        row = {"prompt": [*QUESTION, assistant(begun)], "completion": [assistant(answer)]}
        pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": [assistant("No.")]}
        prompt = tokenizer.render_prompt(QUESTION) + begun
        example = store_of([row], tokenizer)[0]
        assert example.prompt.tolist() == tokenizer.encode(prompt)
        assert learned(tokenizer, example) == [answer + END]
        assert make_prompt(row, "row", tokenizer, 4096).ids == example.prompt.tolist()
        assert make_prompt({"prompt": row["prompt"]}, "row", tokenizer, 4096).ids == example.prompt.tolist()
        assert store_of([pair], tokenizer, "preference")[0].prompt.tolist() == example.prompt.tolist()


# --- keys


@pytest.mark.parametrize("key", ["thinking", "function_call", "name", "refusal", "tool_plan"])
@pytest.mark.parametrize("place", ["user", "assistant"])
def test_a_key_that_the_template_does_not_write_is_counted(tokenizer, store_of, monkeypatch, key, place):
    # transformers gives a thought under every name; here the template knows none of them.
    template = TEMPLATE.replace("{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}", "")
    monkeypatch.setattr(tokenizer._library, "chat_template", template)
    plain = {"messages": [*QUESTION, assistant("Yes.")]}
    number = ["user", "assistant"].index(place)
    rows = [plain, {"messages": [{**m, key: "secret"} if i == number else m for i, m in enumerate(plain["messages"])]}]
    store = store_of(rows, tokenizer)
    assert store[0].prompt.tolist() == store[1].prompt.tolist()
    (note,) = store.notes
    assert f"1 rows have messages with {key!r}, which the chat template does not write" in note
    assert note.endswith(":2)")
    if place == "user":
        assert any(repr(key) in note for note in make_prompt(rows[1], "row", tokenizer, 4096).notes)
    monkeypatch.setattr(
        tokenizer._library, "chat_template", template.replace("{{ m.content", f"{{{{ m.{key} }}}}{{{{ m.content")
    )
    store = store_of(rows[1:], tokenizer)
    assert store.notes == () and "secret" in tokenizer.decode([*store[0].prompt, *store[0].responses[0]])


def test_thoughts_that_a_template_leaves_out_of_earlier_turns_are_no_warning(sdar, fast_dllm, store_of):
    thought = assistant("Yes.", reasoning_content="It is north.")
    rows = [{"messages": [*QUESTION, thought, user("Sure?"), thought]}]
    store = store_of(rows, sdar)
    assert store.notes == () and "It is north." in learned(sdar, store[0])[0]
    (note,) = store_of(rows, fast_dllm).notes
    assert "'reasoning_content', which the chat template does not write" in note


@pytest.mark.parametrize("key", ["images", "image", "audio", "video"])
def test_messages_of_more_than_text_are_refused(tokenizer, store_of, key):
    row = {"messages": [user("What is this?", **{key: ["a.png"]}), assistant("A cat.")]}
    assert f"messages[0]: has {key!r}; models here read text only" in refused(lambda: store_of([row], tokenizer))
    assert f"has {key!r}" in refused(lambda: make_prompt(row, "row", tokenizer, 4096))
    none = {"messages": [user("What is this?", **{key: None}), assistant("A cat.")]}
    assert len(store_of([none], tokenizer)) == 1


def test_half_a_surrogate_pair_anywhere_in_a_message_is_refused(tokenizer, store_of):
    half = "\ud800"
    for row in (
        {"messages": [*QUESTION, assistant("Yes.", reasoning_content=half)]},
        {"messages": [*QUESTION, call(None, half)]},
        {"messages": [*QUESTION, assistant("Yes.")], "tools": [{"name": half}]},
    ):
        assert "half a surrogate pair" in refused(lambda: store_of([row], tokenizer))  # noqa: B023
        if "tools" in row:
            assert "half a surrogate pair" in refused(lambda: make_prompt(row, "row", tokenizer, 4096))  # noqa: B023


def test_messages_of_weight_0_are_not_learned(tokenizer, store_of):
    turns = [
        user("a"),
        assistant("b", weight=0),
        user("c"),
        assistant("d", weight=1),
        user("e"),
        assistant("f", weight=0),
    ]
    row = {"messages": turns}
    last = store_of([row], tokenizer)
    assert learned(tokenizer, last[0]) == [f"d{END}"] and "go on after the assistant's last answer" in last.notes[0]
    every = store_of([{"messages": turns[:4]}], tokenizer, assistant_turns="all")
    assert [learned(tokenizer, every[i]) for i in range(len(every))] == [[f"d{END}"]]
    assert make_prompt(row, "row", tokenizer, 4096).ids == last[0].prompt.tolist()
    none = {"messages": turns[:2]}
    for build in (lambda: store_of([none], tokenizer), lambda: make_prompt(none, "row", tokenizer, 4096)):
        assert "every message of the assistant has the weight 0" in refused(build)
    pair = {"prompt": QUESTION, "chosen": [assistant("Yes.", weight=0)], "rejected": [assistant("No.")]}
    assert "has the weight 0" in refused(lambda: store_of([pair], tokenizer, "preference"))
    for weight in (0.5, "0", [1], 2):
        bad = {"messages": [*QUESTION, assistant("Yes.", weight=weight)]}
        assert "'weight' must be 0 or 1" in refused(lambda: store_of([bad], tokenizer))  # noqa: B023


def test_what_nests_deeper_than_a_template_reads_is_refused(tokenizer, store_of):
    deep = json.loads("[" * 900 + "]" * 900)
    for row in (
        {"messages": [*QUESTION, call(None, deep)]},
        {"messages": [*QUESTION, assistant("Yes.")], "tools": [{"name": deep}]},
    ):
        assert "nested deeper than 100 levels" in refused(lambda: store_of([row], tokenizer))  # noqa: B023


# --- token ids


@pytest.mark.parametrize("column", [{"tools": TOOLS}, {"chat_template_kwargs": {"thinking": True}}])
@pytest.mark.parametrize(("kind", "names"), [("sft", ["completion"]), ("preference", ["chosen", "rejected"])])
def test_token_ids_beside_inputs_of_a_template_are_refused(tokenizer, store_of, column, kind, names):
    ids = {"prompt_ids": [5, 6]} | {f"{name}_ids": [7 + n, 8] for n, name in enumerate(names)}
    for build in (
        lambda: store_of([{**ids, **column}], tokenizer, kind),
        lambda: make_prompt({"prompt_ids": [5, 6], **column}, "row", tokenizer, 4096),
    ):
        assert f"{next(iter(column))}: prompt_ids are taken as they are" in refused(build)
    # As megatron-dtrpo pairs writes pairs: the messages that the ids were made of are there.
    assert len(store_of([{**ids, **column, "prompt": QUESTION}], tokenizer, kind)) == 1
    for nothing in (None, [], {}, ""):
        assert len(store_of([{**ids, **dict.fromkeys(column, nothing)}], tokenizer, kind)) == 1
