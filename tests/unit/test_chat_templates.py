"""Chat templates that end an answer in their own way, leave something out, or are damaged."""

from __future__ import annotations

import json
import re

import pytest

from megatron_dtrpo.data.prompts import prompt_notes, read_prompts
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError
from tests.support.chat_tokenizer import TEMPLATE, save_chat_tokenizer

END, OTHER = "<|im_end|>", "<|endoftext|>"
HEAD = "{{ '<|im_start|>assistant\n' }}"


def user(content, **keys):
    return {"role": "user", "content": content, **keys}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


ASK, YES, NO = [user("Is it cold?")], [assistant("Yes.")], [assistant("No.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def tokenizer_of(folder):
    """The tokenizer with another chat template and end token."""

    def build(template, eos_token=END):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return build_tokenizer("HuggingFaceTokenizer", folder, eos_token=eos_token)

    return build


@pytest.fixture
def store_of(tmp_path):
    def build(rows, tokenizer, kind="sft", **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return build_token_store(path, kind, tokenizer, tmp_path / "cache", **settings)

    return build


def text_of(tokenizer, ids):
    return tokenizer._library.decode(ids)


def prompts_of(tmp_path, rows, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_prompts(path, tokenizer, 4096)


# --- the end of an answer

MESSAGE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + END }}{% endfor %}"
ALWAYS_HEAD = MESSAGE.replace("END", "'<|im_end|>'") + HEAD  # as LLaDA's
NO_END = MESSAGE.replace("END", "'\n'") + HEAD
PLAIN = (
    "{% for m in messages %}{{ m.role | title + ': ' + m.content + '\n\n' }}{% endfor %}"
    "{% if messages[-1].role == 'assistant' %}User:{% else %}Assistant: {% endif %}"
)
LAST_WORDS = TEMPLATE + "{% if messages[-1].role == 'assistant' %}Bye.{% endif %}"
SYSTEM_FIRST = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>' }}{% endif %}" + ALWAYS_HEAD
)
ENDS = {
    "a head behind another end": (ALWAYS_HEAD, OTHER, f"Yes.{END}{OTHER}"),
    "a head behind the end": (ALWAYS_HEAD, END, f"Yes.{END}"),
    "a head behind another end, a system of its own": (SYSTEM_FIRST, OTHER, f"Yes.{END}{OTHER}"),
    "a head and no end": (NO_END, OTHER, f"Yes.{OTHER}"),
    "a head in words and no end": (PLAIN, OTHER, f"Yes.{OTHER}"),
    "white space behind another end": (TEMPLATE, OTHER, f"Yes.{END}{OTHER}"),
    "words behind the end": (LAST_WORDS, END, f"Yes.{END}"),
    "words behind another end": (LAST_WORDS, OTHER, f"Yes.{END}{OTHER}"),
}


@pytest.mark.parametrize("name", ENDS)
def test_nothing_behind_an_answer_is_learned(tokenizer_of, store_of, name):
    template, eos_token, learned = ENDS[name]
    tokenizer = tokenizer_of(template, eos_token)
    asked = [user("Hi"), assistant("Hello"), *ASK]
    begun, rest = [*ASK, assistant("Y")], [assistant("es.")]
    for prompt, answer, whole in ((ASK, YES, learned), (asked, YES, learned), (begun, rest, learned[1:])):
        (example,) = store_of([{"prompt": prompt, "completion": answer}], tokenizer)
        assert text_of(tokenizer, example.responses[0]) == whole
        (pair,) = store_of([{"prompt": prompt, "chosen": answer, "rejected": NO}], tokenizer, "preference")
        assert text_of(tokenizer, pair.responses[0]) == whole
    (example,) = store_of([{"prompt": "Is it cold?", "completion": "Yes."}], tokenizer, apply_chat_template=True)
    assert text_of(tokenizer, example.responses[0]) == learned


def test_a_line_says_what_behind_an_answer_is_not_learned(tokenizer_of):
    lines = {name: tokenizer_of(template, end).note_on_end() for name, (template, end, _) in ENDS.items()}
    assert lines["a head behind the end"] is None and lines["words behind the end"] is None
    head = repr("<|im_start|>assistant")
    assert f"ends an answer with {END}, the end token is {OTHER}" in lines["a head behind another end"]
    assert lines["a head behind another end"].endswith(f"; {head} behind it is not learned")
    assert lines["words behind another end"].endswith("; 'Bye.' behind it is not learned")
    assert lines["white space behind another end"].endswith(f"ends them with {END} alone")
    for name, rest in (("a head and no end", head), ("a head in words and no end", "'User:'")):
        assert lines[name] == (
            f"the chat template writes no end of an answer: answers as messages end with {OTHER}; {rest} behind it is "
            "not learned"
        )


def test_an_answer_that_says_what_stands_behind_answers_keeps_it(tokenizer_of, store_of):
    tokenizer = tokenizer_of(PLAIN, OTHER)
    (example,) = store_of([{"messages": [*ASK, assistant("Write\n\nUser:")]}], tokenizer)
    assert text_of(tokenizer, example.responses[0]) == f"Write\n\nUser:{OTHER}"


# --- keys


def test_keys_that_nothing_reads_are_counted_in_one_line(tmp_path, tokenizer_of, store_of):
    tokenizer = tokenizer_of(TEMPLATE)
    rows = [
        {"messages": ASK + YES},
        {"messages": [user("Is it cold?", id=7, timestamp="2026"), *YES]},
        {"messages": [*ASK, assistant("Yes.", timestamp="2026", **{"{model}": None, "a\nb": 1})]},
    ]
    (note,) = store_of(rows, tokenizer).notes
    assert note.startswith("warning: 2 rows have messages with keys that the chat template does not write: ")
    assert note.endswith(r": 'id', 'timestamp', 'a\nb' (first: " + f"{tmp_path}/rows.jsonl:2)") and "\n" not in note
    (note,) = prompt_notes(prompts_of(tmp_path, rows, tokenizer))
    assert note.startswith("warning: 1 rows have") and ": 'id', 'timestamp' (first: " in note
    pair = {"prompt": ASK, "chosen": [assistant("Yes.", score=1)], "rejected": [assistant("No.", score=0)]}
    (note,) = store_of([pair], tokenizer, "preference").notes
    assert ": 'score' (first: " in note


def test_many_keys_are_one_short_line(tokenizer_of, store_of):
    keys = [{"messages": [user("Is it cold?", **{f"key {number}": 1}), *YES]} for number in range(100)]
    (note,) = store_of(keys, tokenizer_of(TEMPLATE)).notes
    assert "'key 7', 92 more (first: " in note and len(note) < 400


def test_usual_keys_and_those_that_a_template_reads_are_no_warning(tokenizer_of, store_of):
    usual = {"messages": [user("Is it cold?", weight=0), assistant("Yes.", weight=1, tool_calls=[])]}
    assert store_of([usual], tokenizer_of(TEMPLATE)).notes == ()
    rows = [{"messages": [user("Is it cold?", id="number 7"), *YES]}]
    read = tokenizer_of(TEMPLATE.replace("m.content", "(m.id or '') + m.content"))
    assert store_of(rows, read).notes == () and "number 7" in text_of(read, store_of(rows, read)[0].prompt)
    named = tokenizer_of(TEMPLATE + "{# id #}")
    assert ": 'id' (first: " in store_of(rows, named).notes[0]
    dumped = tokenizer_of(TEMPLATE.replace("m.content", "m | tojson"))
    assert store_of(rows, dumped).notes == () and '"number 7"' in text_of(dumped, store_of(rows, dumped)[0].prompt)


# --- damaged templates


def refused(build):
    with pytest.raises(UserError) as caught:
        build()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_a_template_that_is_cut_is_refused_or_noted(tmp_path, tokenizer_of, store_of, share):
    tokenizer = tokenizer_of(TEMPLATE[: int(len(TEMPLATE) * share)])
    rows = [{"messages": ASK + YES}] * 3
    for build in (lambda: store_of(rows, tokenizer), lambda: prompts_of(tmp_path, rows, tokenizer)):
        line = refused(build)
        assert re.search(r"none of 3 rows can be used: .*:1: the chat template is damaged, line \d: ", line)
        assert line.endswith("rows.jsonl:3)") and "fetch its file again" in line


def test_a_template_that_is_cut_between_its_parts_is_noted(tmp_path, tokenizer_of, store_of):
    """It renders, and the answer begins with what the decoder never is given."""
    tokenizer = tokenizer_of(TEMPLATE[: TEMPLATE.index("{% if add_generation_prompt")])
    rows = [{"messages": ASK + YES}]
    (trained,) = store_of(rows, tokenizer).notes
    (decoded,) = prompt_notes(prompts_of(tmp_path, rows, tokenizer))
    assert trained == decoded
    assert r"answers begin with '<|im_start|>assistant\n', which is learned" in trained and "\n" not in trained
    text = store_of([{"prompt": "Is it cold?", "completion": "Yes."}], tokenizer, apply_chat_template=True)
    assert text.notes == (trained,)


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "user and the assistant"),
        ("<|im_start|>user\n", "user and the assistant"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "assistant"),
        ("{% for m in messages %}{% if m.role != 'user' %}{{ m.content }}{% endif %}{% endfor %}", "user"),
    ],
)
def test_a_template_without_the_words_is_refused(tmp_path, tokenizer_of, store_of, template, roles):
    tokenizer = tokenizer_of(template)
    row = {"messages": ASK + YES}
    for build in (lambda: store_of([row], tokenizer), lambda: prompts_of(tmp_path, [row], tokenizer)):
        assert f"the chat template does not write the words of the {roles}; fetch" in refused(build)


def test_messages_that_a_template_leaves_out_are_counted(tmp_path, tokenizer_of, store_of):
    first_only = TEMPLATE.replace("m.content", "(m.content if loop.index0 != 1 or messages | length < 3 else '')")
    without = "{% for m in messages if m.role != 'system' %}" + TEMPLATE.partition("%}")[2]
    system = {"role": "system", "content": "Speak like a pirate."}
    rows = [{"messages": ASK + YES}, {"messages": [system, *ASK, *YES]}]
    for template, row, role in (
        (without, rows[1], "system"),
        (first_only, {"messages": [user("Hi"), assistant("Hello you"), *ASK, *YES]}, "assistant"),
    ):
        tokenizer = tokenizer_of(template)
        (note,) = store_of([rows[0], row], tokenizer).notes
        assert note.startswith("warning: 1 rows have messages whose words the chat template leaves out")
        assert f"of the role {role!r} (first: " in note and note.endswith(":2)")
        assert prompt_notes(prompts_of(tmp_path, [rows[0], row], tokenizer)) == [note]


def test_what_a_template_writes_in_its_own_way_is_not_missed(tokenizer_of, store_of):
    escaped = TEMPLATE.replace("m.content", "(m.content.strip() | tojson if m.role == 'tool' else m.content.strip())")
    call = assistant("", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {}}}])
    reply = {"role": "tool", "content": '  {"is": "cold",\n "in": "\u00d8rsta"}'}
    calls = escaped.replace("+ '<|im_end|>", "+ (m.tool_calls | tojson if m.tool_calls else '') + '<|im_end|>")
    row = {"prompt": ASK, "completion": [call, reply, assistant(" <think>so</think> Yes.\n")]}
    assert store_of([row], tokenizer_of(calls)).notes == ()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_a_tokenizer_file_that_is_cut_is_named(tmp_path, name):
    folder = save_chat_tokenizer(tmp_path)
    text = (folder / name).read_text(encoding="utf-8")
    (folder / name).write_text(text[: len(text) // 2], encoding="utf-8")
    line = refused(lambda: build_tokenizer("HuggingFaceTokenizer", folder))
    assert line.startswith(f"{folder / name}: not valid JSON (") and line.endswith("; fetch the file again")


def test_the_templates_of_real_models_are_whole(shared_dir, tmp_path, store_of):
    system = {"role": "system", "content": "Be brief."}
    turns = [system, user("Hi"), assistant("<think>\nhm\n</think>\n\nHello"), user("So?"), assistant("So.")]
    for name in ("fast_dllm_v2_7b", "sdar_1_7b_chat"):
        tokenizer = build_tokenizer("HuggingFaceTokenizer", shared_dir / "data" / name, eos_token=END)
        assert tokenizer.note_on_end() is None
        assert store_of([{"messages": turns}], tokenizer).notes == ()
