"""One way from a row to token ids: training, decoding and TRL agree on what the prompt and the answer are."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from megatron_dtrpo.config.estimators import EstimatorOptions
from megatron_dtrpo.data.batches import BatchBuilder, Noising
from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.data.prompts import make_prompt, prompt_notes
from megatron_dtrpo.data.sampler import SampleOrder
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.diffusion.decoding import Completion
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.online.pairs import Rewarded, pair_row

KINDS = {"preference": ("chosen", "rejected"), "sft": ("completion",)}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
HH = "\n\nHuman: How do I get to the station?\n\nAssistant:"
CHATML = "<|im_start|>user\nHow far?<|im_end|>\n<|im_start|>assistant\n"


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def call(city, **keys):
    function = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
    return {"role": "assistant", "tool_calls": [function], **keys}


def tool(content):
    return {"role": "tool", "name": "weather", "content": content}


QUESTION = [user("Is it cold in Oslo?")]
SYSTEM = {"role": "system", "content": "Be brief."}
EXCHANGE = [call("Oslo", content=None), tool("-3 degrees"), assistant("Yes, -3 degrees.")]
# Rows that --objective sft, --objective preference and decoding read.
ROWS = {
    "sft": {
        "text": {"prompt": "1+1=", "completion": "2"},
        "messages": {"messages": [*QUESTION, assistant("Yes.")]},
        "messages beside a label": {"prompt": "Is it cold in Oslo?", "messages": [*QUESTION, assistant("Yes.")]},
        "many turns": {"messages": [SYSTEM, user("Hi"), assistant("Hello"), *QUESTION, assistant("Yes.")]},
        "completion of messages": {"prompt": QUESTION, "completion": [assistant("Yes.")]},
        "prefill": {"prompt": [*QUESTION, assistant("Yes, it")], "completion": [assistant(" is.")]},
        "tools": {"messages": [*QUESTION, call("Oslo")], "tools": TOOLS},
        "tools as text": {"messages": [*QUESTION, *EXCHANGE], "tools": json.dumps(TOOLS)},
        "an exchange": {"prompt": QUESTION, "completion": EXCHANGE, "tools": TOOLS},
        "good of KTO": {"prompt": QUESTION, "completion": [assistant("Yes.")], "label": True},
    },
    "preference": {
        "text": {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
        "implicit text": {"chosen": f"{HH} Walk east.", "rejected": f"{HH} Walk"},
        "implicit ChatML": {"chosen": f"{CHATML}2 km", "rejected": f"{CHATML}2 miles"},
        "implicit words": {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        "implicit messages": {"chosen": [*QUESTION, assistant("Yes.")], "rejected": [*QUESTION, assistant("No.")]},
        "UltraFeedback": {
            "prompt": "Is it cold in Oslo?",
            "chosen": [*QUESTION, assistant("Yes.")],
            "rejected": [*QUESTION, assistant("No.")],
            "messages": [*QUESTION, assistant("Yes.")],
            "score_chosen": 8.0,
        },
        "explicit messages": {"prompt": QUESTION, "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        "after a call": {
            "chosen": [*QUESTION, *EXCHANGE],
            "rejected": [*QUESTION, *EXCHANGE[:2], assistant("No.")],
            "tools": TOOLS,
        },
        "exchanges": {"prompt": QUESTION, "chosen": EXCHANGE, "rejected": [assistant("No.")], "tools": TOOLS},
        "prefill": {
            "prompt": [*QUESTION, assistant("I say")],
            "chosen": [assistant(" yes.")],
            "rejected": [assistant(" no.")],
        },
    },
}
CASES = [(kind, name) for kind, rows in ROWS.items() for name in rows]


def build(shared_dir, name):
    # SDAR's tokenizer has another end token than its chat template writes.
    return build_tokenizer("HuggingFaceTokenizer", shared_dir / "data" / name, eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def fast_dllm(shared_dir):
    return build(shared_dir, "fast_dllm_v2_7b")


@pytest.fixture(scope="module")
def sdar(shared_dir):
    return build(shared_dir, "sdar_1_7b_chat")


@pytest.fixture(params=["fast_dllm", "sdar"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def store_of(tmp_path):
    def build(rows, kind, tokenizer, **settings):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return build_token_store(path, kind, tokenizer, tmp_path / "cache", **settings)

    return build


def spoken(tokenizer, example, response=0) -> list[str]:
    """What the assistant writes in a response, special tokens included."""
    ids = example.responses[response]
    return [tokenizer._library.decode(ids[begin:end]) for begin, end in example.turns[response]]


def error_of(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_decoded_prompt_is_the_trained_one(tokenizer, store_of, kind, name):
    row = {**ROWS[kind][name], "answer": "Yes."}
    store = store_of([row], kind, tokenizer)
    assert make_prompt(row, "row", tokenizer, 4096).ids == store[0].prompt.tolist()
    # The answer is in none of them; the words of a call stand in the template's own explanation of calls.
    for response in store[0].responses if "tools" not in row else ():
        written = tokenizer.decode(response).strip().split()[-1]
        assert written not in tokenizer.decode(store[0].prompt).split()


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_text_is_what_trl_renders(tokenizer, store_of, kind, name):
    data_utils = pytest.importorskip("trl.data_utils")
    row = ROWS[kind][name]
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    keys = ("prompt", *KINDS[kind]) if "messages" not in row or kind == "preference" else ("messages",)
    # SDAR's template does not take a missing content, TRL neither.
    known = {key: _with_content(row[key]) for key in keys if key in row}
    if kind == "preference":
        known = data_utils.maybe_extract_prompt(known)
    theirs = data_utils.maybe_apply_chat_template(known, tokenizer._library, tools=tools)
    example = store_of([row], kind, tokenizer)[0]
    text = tokenizer._library.decode
    prompt, responses = text(example.prompt), [text(response) for response in example.responses]
    eos = tokenizer.eos_token
    if "text" in theirs:
        assert prompt + responses[0] == theirs["text"].rstrip()
    elif name == "prefill":  # with the answer behind it, TRL ends the turn and begins another
        alone = data_utils.maybe_apply_chat_template({"prompt": row["prompt"]}, tokenizer._library)
        assert prompt == alone["prompt"]
        assert responses[0] == row[KINDS[kind][0]][0]["content"] + eos
    else:
        for key, response in zip(KINDS[kind], responses, strict=True):
            whole = theirs["prompt"] + theirs[key]
            assert prompt + response == (whole.rstrip() if whole.rstrip().endswith(eos) else whole + eos)
            if not name.startswith("implicit"):  # TRL cuts at a letter
                assert prompt == theirs["prompt"]


def _with_content(value):
    if not isinstance(value, list):
        return value
    return [{**message, "content": message.get("content") or ""} for message in value]


def test_tools_are_part_of_the_prompt_and_of_the_fingerprint(tokenizer, store_of):
    messages = [*QUESTION, assistant("Yes.")]
    same = [{"messages": messages, "tools": each} for each in (TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])])]
    none = [{"messages": messages, "tools": each} for each in (None, [], "", "[]")] + [{"messages": messages}]
    whole = tokenizer._library.apply_chat_template(messages, tools=TOOLS, tokenize=False).rstrip()
    store = store_of(same + none, "sft", tokenizer)
    examples = [[*store[i].prompt.tolist(), *store[i].responses[0].tolist()] for i in range(len(store))]
    assert examples[0] == examples[1] == examples[2] == tokenizer.encode(whole)
    assert examples[3] == examples[4] == examples[5] == examples[6] == examples[7] != examples[0]
    assert "weather" in tokenizer.decode(store[0].prompt)
    assert store_of(same, "sft", tokenizer).content != store_of(none[:3], "sft", tokenizer).content


def test_variables_of_the_template(sdar, fast_dllm, store_of):
    messages = [*QUESTION, assistant("Yes.")]
    rows = [
        {"messages": messages, "chat_template_kwargs": each}
        for each in ({"enable_thinking": False}, '{"enable_thinking": false}', None, {}, {"enable_thinking": None})
    ]
    store = store_of(rows, "sft", sdar)
    prompts = [store[i].prompt.tolist() for i in range(5)]
    thought = sdar._library.apply_chat_template(
        QUESTION, add_generation_prompt=True, enable_thinking=False, tokenize=False
    )
    assert prompts[0] == prompts[1] == sdar.encode(thought) != prompts[2] == prompts[3] == prompts[4]
    assert make_prompt(rows[0], "row", sdar, 4096).ids == prompts[0]
    missing, taken = "has no variable '{0}'", "'{0}' is no variable"
    names = {"thinking": missing, "role": missing, "loop": missing, "ns": missing, "tokenize": taken, "tools": taken}
    for name, words in (names | dict.fromkeys(("messages", "add_generation_prompt"), taken)).items():
        words = words.format(name)
        bad = {"messages": messages, "chat_template_kwargs": {name: True}}
        for build in (lambda: store_of([bad], "sft", sdar), lambda: make_prompt(bad, "row", sdar, 4096)):  # noqa: B023
            assert words in error_of(build)
    assert "has no variable 'enable_thinking'" in error_of(lambda: store_of(rows[:1], "sft", fast_dllm))


def test_a_template_that_does_not_write_tools_is_an_error(fast_dllm, store_of, monkeypatch):
    plain = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    plain += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    monkeypatch.setattr(fast_dllm._library, "chat_template", plain)
    tools = {"messages": [*QUESTION, assistant("Yes.")], "tools": TOOLS}
    calls = {"messages": [*QUESTION, *EXCHANGE]}
    text = {"prompt": "1+1=", "completion": "2", "tools": TOOLS}
    for row, words in (
        (tools, "tools: the chat template does not write them"),
        (calls, "tool_calls: the chat template does not write them"),
        (text, "tools: the prompt is text, which no chat template writes"),
    ):
        assert words in error_of(lambda: store_of([row], "sft", fast_dllm))  # noqa: B023
        assert words in error_of(lambda: make_prompt(row, "row", fast_dllm, 4096))  # noqa: B023


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"tools": "no JSON"}, "tools: is text that is no JSON"),
        ({"tools": {"name": "weather"}}, "tools: must be a list of objects, not an object"),
        ({"tools": [3]}, "tools[0]: must be an object, a JSON schema, not a number"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs: must be an object, not a list"),
        (
            {"messages": [*QUESTION, {**call("Oslo"), "tool_calls": ["weather"]}]},
            "'tool_calls' must be a list of objects",
        ),
        ({"messages": [{**QUESTION[0], "tool_calls": [{"name": "weather"}]}]}, "only the assistant calls tools"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": None}]}, "'content' must be text, not missing"),
        ({"messages": [{"content": "Hi"}, assistant("Yes.")]}, "messages[0]: 'role' must be text, not missing"),
        ({"messages": [*QUESTION, assistant("Yes."), assistant("No.")]}, "two messages of the assistant in a row"),
        ({"messages": [*QUESTION, SYSTEM, assistant("No.")]}, "the prompt ends with a message of the role 'system'"),
        ({"messages": [assistant("Hi")]}, "nothing comes before the assistant's message"),
    ],
)
def test_training_and_decoding_refuse_in_the_same_words(fast_dllm, store_of, columns, words):
    row = {"messages": [*QUESTION, assistant("Yes.")], **columns}
    trained = error_of(lambda: store_of([row], "sft", fast_dllm))
    assert words in trained
    if row["messages"][-1]["role"] == "assistant":
        assert error_of(lambda: make_prompt(row, "row", fast_dllm, 4096)).removeprefix("row: ") in trained


def test_a_prompt_message_without_a_role_is_an_error_when_decoding(fast_dllm):
    for row in ({"prompt": [{"content": "Hi"}]}, {"messages": [{"content": "Hi"}, user("2+2?")]}):
        assert "[0]: 'role' must be text, not missing" in error_of(lambda: make_prompt(row, "r", fast_dllm, 99))  # noqa: B023


def test_messages_without_an_answer_are_a_prompt(fast_dllm):
    turns = [SYSTEM, *QUESTION]
    assert make_prompt({"messages": turns}, "row", fast_dllm, 99).ids == fast_dllm.encode_prompt(turns)


@pytest.mark.parametrize("label", [False, 0, "False", 0.0, -1, "no", "bad"])
def test_bad_completions_of_kto_are_not_learned(fast_dllm, store_of, label):
    for columns in (
        {"prompt": "1+1=", "completion": "3"},
        {"messages": [user("1+1="), assistant("3")]},
        {"prompt_ids": [5, 6], "completion_ids": [7, 8]},
    ):
        rows = [{**columns, "label": True}, {**columns, "label": label}]
        for turns in ("last", "all"):
            message = error_of(lambda: store_of(rows, "sft", fast_dllm, assistant_turns=turns))  # noqa: B023
            assert re.search(r":2: label: is .*: the completion is one to avoid", message)
    row = {"prompt": "1+1=", "completion": "3", "label": label}
    assert "(KTO) are no pair" in error_of(lambda: store_of([row], "preference", fast_dllm))


@pytest.mark.parametrize("role", ["developer", "human", "ipython"])
def test_a_message_that_the_template_does_not_write_is_an_error(fast_dllm, sdar, store_of, role):
    """Templates pass over roles that they do not know, and the question would be gone."""
    row = {"messages": [{"role": role, "content": "Is it cold in Oslo?"}, assistant("Yes.")]}
    for tokenizer in (fast_dllm, sdar):
        for build in (lambda: store_of([row], "sft", tokenizer), lambda: make_prompt(row, "row", tokenizer, 4096)):  # noqa: B023
            assert f"does not write the message of the role {role!r}" in error_of(build)


def test_calls_without_content_and_answers_of_several_messages(tokenizer, store_of):
    missing, null, empty = call("Oslo"), call("Oslo", content=None), call("Oslo", content="")
    rows = [
        {"prompt": QUESTION, "completion": [first, tool("-3"), assistant("Yes.")], "tools": TOOLS}
        for first in (missing, null, empty)
    ]
    as_text = {**missing, "tool_calls": json.dumps(missing["tool_calls"]), "reasoning_content": None}
    rows.append({**rows[0], "completion": [as_text, tool("-3"), assistant("Yes.")]})
    store = store_of(rows, "sft", tokenizer)
    assert len({tuple(store[i].responses[0].tolist()) for i in range(4)}) == 1
    written = spoken(tokenizer, store[0])
    assert len(written) == 2 and written[0].endswith("</tool_call><|im_end|>") and '"city": "Oslo"' in written[0]
    assert written[1].endswith("Yes.<|im_end|>") and "-3" not in "".join(written)
    whole = tokenizer._library.decode(store[0].responses[0])
    assert "<tool_response>\n-3\n</tool_response>" in whole and whole.endswith("Yes.<|im_end|>")
    # A call as the whole answer, and within a prompt.
    store = store_of([{"messages": [*QUESTION, missing]}, {"messages": [*QUESTION, *EXCHANGE]}], "sft", tokenizer)
    assert '"city": "Oslo"' in spoken(tokenizer, store[0])[0]
    assert '"city": "Oslo"' in tokenizer.decode(store[1].prompt) and "Yes" in spoken(tokenizer, store[1])[0]


def test_a_template_that_prints_a_missing_content(fast_dllm, store_of, monkeypatch):
    """Nothing is learned that is not in the file, as the word None would be; and where a content, be it
    empty, keeps it from writing the calls, it gets none."""
    calls = "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    ends = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    begins = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    for body in (
        f"{{{{ m.content }}}}{calls}",
        f"{{% if m.content is defined and m.content is not none %}}{{{{ m.content }}}}{{% else %}}{calls}{{% endif %}}",
    ):
        monkeypatch.setattr(fast_dllm._library, "chat_template", begins + body + ends)
        store = store_of([{"messages": [*QUESTION, call("Oslo", content=None)]}], "sft", fast_dllm)
        assert "Oslo" in spoken(fast_dllm, store[0])[0] and "None" not in spoken(fast_dllm, store[0])[0]


def test_conversations_that_part_before_the_last_turn(fast_dllm, store_of):
    later = [user("And tomorrow?"), assistant("Colder.")]
    row = {"chosen": [*QUESTION, assistant("Yes."), *later], "rejected": [*QUESTION, assistant("No."), *later]}
    advice = "end both after the first answer that differs"
    assert f"chosen: a message of the role 'user' follows the answer; {advice}" in error_of(
        lambda: store_of([row], "preference", fast_dllm)
    )
    asked = {"chosen": [*QUESTION, user("Now?"), assistant("Yes.")], "rejected": [*QUESTION, assistant("No.")]}
    assert advice in error_of(lambda: store_of([asked], "preference", fast_dllm))
    text = {
        name: f"{HH} {answer}\n\nHuman: Thanks\n\nAssistant: Sure"
        for name, answer in (("chosen", "East."), ("rejected", "West."))
    }
    assert advice in error_of(lambda: store_of([text], "preference", fast_dllm))


def test_prompts_that_two_texts_share(tokenizer, store_of):
    """Cut after the words that say that the assistant speaks, or before the first word that differs; no token lies
    across the cut."""
    two = f"{HH} East.\n\nHuman: How far?\n\nAssistant:"
    cases = [
        (HH, " Walk east, then north.", " Walk east, then south."),
        (HH, " Walk", " Walk on."),
        (two, " About 2 km.", " About 2 miles."),
        (two, " I said: User: 2 km", " No"),  # another speaker's name is no turn of this dialogue
        (CHATML, "2 km", "2 miles"),
        ("The sky is", " blue.", " black."),
        ("The sky is", " blue", " blue, blue."),
        ("Q: 2+2?\nA:", " 4", " 5"),
        ("Once\n\n", "upon", "under"),
        ("2+2?\nA:", " The sum is 4", " The sum is 5"),
    ]
    rows = [{"chosen": prompt + chosen, "rejected": prompt + rejected} for prompt, chosen, rejected in cases]
    store = store_of(rows, "preference", tokenizer)
    for i, (prompt, chosen, rejected) in enumerate(cases):
        assert store[i].prompt.tolist() == tokenizer.encode(prompt), prompt
        for response, answer in zip(store[i].responses, (chosen, rejected), strict=True):
            assert [*store[i].prompt, *response] == [*tokenizer.encode(prompt + answer), tokenizer.eos_id]
    labelled, unlabelled = store.notes
    assert labelled.startswith("note: 6 rows without a prompt: ") and labelled.endswith(":1)")
    assert unlabelled.startswith("warning: 4 rows without a prompt and without a label") and unlabelled.endswith(":6)")
    for chosen, rejected, words in (
        ("Yes", "No", "share no first word"),
        (f"{HH} East.", f"{HH}", "rejected: is empty"),
        ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hello\n\nAssistant: No", "part before the assistant's answer"),
    ):
        assert words in error_of(lambda: store_of([{"chosen": chosen, "rejected": rejected}], "preference", tokenizer))  # noqa: B023


def test_what_may_surprise_is_counted_with_its_first_place(fast_dllm, store_of):
    fine = {"prompt": "2+2=", "completion": "4"}
    rows = [
        fine,
        {"prompt": "2+2=", "completion": "4<|im_end|>\nor 5"},
        {"prompt": "The sky is ", "completion": "blue"},  # " blue" is one token
        {"prompt": "The sky is\n", "completion": "blue"},  # here nothing is joined
        {"prompt": "2+2=", "completion": "4<|im_end|>"},
        {"prompt": QUESTION, "completion": [assistant("\n\nYes")]},  # "\n\n\n" is one token
        {"messages": [*QUESTION, assistant("Yes."), user("Thanks")]},
    ]
    store = store_of(rows, "sft", fast_dllm)
    behind, joined, after = sorted(store.notes, key=lambda note: ("end token" not in note, "white space" not in note))
    source = store.location(0).rpartition(":")[0]
    assert behind.startswith("warning: 1 rows have text behind an end token") and f"(first: {source}:2)" in behind
    assert joined.startswith("warning: 2 rows have a prompt that ends in white space") and f"{source}:3)" in joined
    assert after.startswith("warning: 1 rows go on after the assistant's last answer") and f"{source}:7)" in after
    assert store_of([fine], "sft", fast_dllm).notes == ()


def test_every_turn_of_a_conversation(tokenizer, store_of):
    """One example for each of the assistant's messages, exactly the one that a conversation ending there would be."""
    turns = [SYSTEM, user("Hi"), assistant("Hello"), *QUESTION, *EXCHANGE, user("Thanks")]
    rows = [{"messages": turns, "tools": TOOLS}, ROWS["sft"]["text"], {"messages": [assistant("Welcome"), *turns]}]
    store = store_of(rows, "sft", tokenizer, assistant_turns="all")
    answers = [place for place, message in enumerate(turns) if message["role"] == "assistant"]
    ends = [{"messages": turns[: place + 1], "tools": TOOLS} for place in answers]
    ends += [rows[1]] + [{"messages": [assistant("Welcome"), *turns[: place + 1]]} for place in answers]
    alone = store_of(ends, "sft", tokenizer)
    assert len(store) == len(alone) == 7
    for i in range(7):
        assert store[i].prompt.tolist() == alone[i].prompt.tolist()
        assert store[i].responses[0].tolist() == alone[i].responses[0].tolist()
    assert [store.row_number(i) for i in range(7)] == [0, 0, 0, 1, 2, 2, 2]
    assert store.location(6).endswith(":3")
    assert "note: 3 rows are 7 examples, one for each of the assistant's messages" in store.notes
    assert any(note.startswith("warning: 1 rows begin with the assistant's message") for note in store.notes)
    last = store_of(rows, "sft", tokenizer)
    assert len(last) == 3 and last.directory != store.directory


def test_a_packed_exchange_masks_and_reads_what_the_assistant_writes(fast_dllm, store_of):
    """The tool's reply is seen and never read; lengths count what is learned, and the layout is as long as planned."""
    rows = [ROWS["preference"]["exchanges"], ROWS["preference"]["explicit messages"]]
    store = store_of(rows, "preference", fast_dllm)
    options = EstimatorOptions(steps_per_block=1)  # everything of a block is masked and read
    noising = Noising("dtrpo", options, 1, "clean", 8, fast_dllm.mask_id, seed=0)
    builder = BatchBuilder(
        store,
        SampleOrder(np.arange(2), seed=0),
        noising,
        global_batch_size=2,
        micro_batch_size=2,
        seq_length=4096,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    for index in range(2):
        example = store[index]
        batch = builder.micro_batch([Sample(0, index)])
        assert len(batch.sequence) == builder.packed_lengths[index]
        learned = [[r[b:e].tolist() for b, e in t] for r, t in zip(example.responses, example.turns, strict=True)]
        for response, turns in enumerate(learned):
            read = batch.sequence.target_token[batch.sequence.target_response == response]
            assert sorted(read.tolist()) == sorted(token for turn in turns for token in turn)
            assert batch.response_length[response] == sum(map(len, turns))
    assert len(store[0].turns[0]) == 2 and len(store[0].turns[1]) == len(store[1].turns[0]) == 1


def test_pairs_keep_the_prompt_and_not_the_answer(fast_dllm):
    """A pair that was built from a conversation with its answer has the question as its prompt."""
    row = {"messages": [*QUESTION, assistant("Yes.")], "answer": "Yes."}
    prompt = make_prompt(row, "row", fast_dllm, 4096)
    good, bad = (completion_of(fast_dllm, text) for text in ("Yes.", "No."))
    pair = pair_row(prompt, Rewarded(good, "Yes.", 1), Rewarded(bad, "No.", 0))
    assert pair["prompt"] == QUESTION and pair["chosen"] == [assistant("Yes.")] and "messages" not in pair
    assert pair["prompt_ids"] == fast_dllm.encode_prompt(QUESTION)
    again = make_prompt(pair, "row", fast_dllm, 4096)
    assert again.ids == pair["prompt_ids"] and again.asked == QUESTION


def completion_of(tokenizer, text):
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    steps = list(range(len(ids)))
    return Completion(ids, steps, [1.0] * len(ids), [0] * len(ids), passes=len(ids), ended=True, discarded=[])


def test_the_harness_gives_the_trained_prompt(tokenizer):
    pytest.importorskip("lm_eval")
    from megatron_dtrpo.evaluation.harness import HarnessModel

    model = HarnessModel.__new__(HarnessModel)
    model.text = tokenizer
    begun = [*QUESTION, assistant("The answer is")]
    for history, asks in ((QUESTION, True), (begun, False)):
        text = model.apply_chat_template(history, add_generation_prompt=asks)
        assert tokenizer.encode(text) == make_prompt({"prompt": history}, "row", tokenizer, 99).ids
    assert text.endswith("The answer is")


def test_prompts_that_were_found_are_counted_when_decoding(fast_dllm):
    rows = [ROWS["preference"]["UltraFeedback"], ROWS["preference"]["text"], ROWS["preference"]["implicit text"]]
    prompts = [make_prompt(row, f"row {n}", fast_dllm, 4096) for n, row in enumerate([*rows, rows[0]])]
    messages, text = prompt_notes(prompts)
    assert messages.startswith("note: 2 rows without a prompt of messages") and messages.endswith("(first: row 0)")
    assert text.startswith("note: 1 rows without a prompt: ") and text.endswith("(first: row 2)")


def test_arguments_that_a_template_writes_in_quotes(fast_dllm, sdar, store_of):
    as_text = call("Oslo")
    as_text["tool_calls"][0]["function"]["arguments"] = '{"city": "Oslo"}'
    row = {"messages": [*QUESTION, as_text], "tools": TOOLS}
    (note,) = store_of([row], "sft", fast_dllm).notes
    assert note.startswith("warning: 1 rows give the arguments of a call as JSON text")
    assert store_of([row], "sft", sdar).notes == ()  # its template writes the text itself
    assert store_of([{**row, "messages": [*QUESTION, call("Oslo")]}], "sft", fast_dllm).notes == ()


@pytest.mark.parametrize("name", ["system", "system_prompt", "input", "context", "documents", "history"])
@pytest.mark.parametrize("content", ["Be brief.", [["Hello", "Hello to you"]], {"text": "The sky is blue."}])
def test_a_column_of_the_prompt_that_is_not_read_is_a_warning(fast_dllm, store_of, name, content):
    """Orca's system message, Alpaca's input and history would be missing from the prompt without a word."""
    rows = [{"prompt": "1+1=", "completion": "2", name: value} for value in (content, "", None, [], 3)]
    pair = {"prompt": "1+1=", "chosen": "2", "rejected": "3", name: content}
    words = f"a column {name!r}, which is not read"
    for store in (store_of(rows, "sft", fast_dllm), store_of([pair], "preference", fast_dllm)):
        (note,) = store.notes
        assert words in note and "1 rows" in note
    assert words in prompt_notes([make_prompt(rows[0], "row", fast_dllm, 99)])[0]


@pytest.mark.parametrize("name", ["Prompt", "user_prompt", "context"])
def test_a_prompt_of_another_name_is_not_cut_from_the_answers(fast_dllm, store_of, name):
    row = {name: "1+1=", "chosen": "The sum is 2", "rejected": "The sum is 3"}
    assert f"rename {name!r} to 'prompt'" in error_of(lambda: store_of([row], "preference", fast_dllm))
