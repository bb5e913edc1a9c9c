"""The prompt of a row has the same token ids wherever it is read, or is refused in the same words."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from megatron_dtrpo.config.rules import fill_objective_defaults
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.data.prompts import read_prompts
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.evaluation.periodic import PeriodicEvaluation
from megatron_dtrpo.training.setup import open_data
from tests.support.chat_tokenizer import save_chat_tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def user(content, **keys):
    return {"role": "user", "content": content, **keys}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def system(content):
    return {"role": "system", "content": content}


ASK = [user("Is it cold in Oslo?")]
CALL = assistant("", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}])
REPLY = {"role": "tool", "content": "-3 degrees"}
YES, NO = [assistant("Yes.")], [assistant("No.")]
IDS = {"prompt_ids": [5, 6, 7], "completion_ids": [8], "chosen_ids": [8], "rejected_ids": [9]}


def texts(prompt, **columns):
    return {"prompt": prompt, "completion": " 4", "chosen": " 4", "rejected": " 5", **columns}


def explicit(prompt, good=YES, bad=NO, **columns):
    return {"prompt": prompt, "completion": good, "chosen": good, "rejected": bad, **columns}


def whole(asked, **columns):
    """Conversations that hold their prompt."""
    return {"messages": asked + YES, "chosen": asked + YES, "rejected": asked + NO, **columns}


LONG = [system("Be brief."), user("Hi"), assistant("Hello"), *ASK]
ROWS = {
    "text": texts("2+2="),
    "text that ends in white space": texts("2+2= \n"),
    "text beside a system column": texts("2+2=", system="Be brief."),
    "text beside a context column": texts("2+2=", context="Sums."),
    "text with an end token": texts("2+2?<|im_end|>\n"),
    "text that begins with a bracket": texts("[1, 2] has the sum"),
    "text in other scripts": texts("\u4e2d\u6587\ufeff \U0001f600 2+2="),
    "messages": explicit(ASK),
    "messages with a system": explicit([system("Be brief."), *ASK]),
    "messages of several turns": explicit(LONG),
    "messages as JSON text": {name: json.dumps(value) for name, value in explicit(ASK).items()},
    "messages beside a system column": explicit(ASK, system="Be brief."),
    "conversations": whole(ASK),
    "conversations of several turns": whole(LONG),
    "conversations beside a label": whole(ASK, prompt="a label"),
    "conversations as JSON text": {name: json.dumps(value) for name, value in whole(LONG).items()},
    "conversations with a thought": whole([user("Hi"), assistant("<think>\nhm\n</think>\n\nHello"), *ASK]),
    "conversations with reasoning_content": whole([user("Hi"), assistant("Hello", reasoning_content="hm"), *ASK]),
    "names": whole([user("Is it cold?", name="Ann")]),
    "a weight": whole([user("Hi"), assistant("Hello", weight=0), *ASK]),
    "null keys": whole([user("Hi", tool_calls=None, name=None), assistant("Hello", images=None), *ASK]),
    "a prefill": explicit([*ASK, assistant("I say")], [assistant(" yes.")], [assistant(" no.")]),
    "a prefill that ends in white space": explicit(
        [*ASK, assistant("I say ")], [assistant("yes.")], [assistant("no.")]
    ),
    "a thought that is begun": explicit([*ASK, assistant("<think>\n")], [assistant("hm\n</think>\n\nYes.")]),
    "tools": whole(ASK, tools=TOOLS),
    "tools as JSON text": explicit([system("Be brief."), *ASK], tools=json.dumps(TOOLS)),
    "no tools": explicit(ASK, tools=[], chat_template_kwargs={}),
    "after a call": whole([*ASK, CALL, REPLY], tools=TOOLS),
    "after a call, explicit": explicit([*ASK, CALL, REPLY], tools=TOOLS),
    "variables": explicit(ASK, chat_template_kwargs={"enable_thinking": False}),
    "variables, whole": whole(ASK, chat_template_kwargs='{"enable_thinking": true}'),
    "a role that some templates write": explicit([{"role": "developer", "content": "Be brief"}, *ASK]),
    "ids": IDS,
    "ids beside messages": {**IDS, **explicit(ASK)},
    "ids beside text": {**IDS, **texts("2+2=")},
}
# LLaDA's template writes every role and no tools, Fast-dLLM's has no variables.
OF_SOME_TEMPLATES = {name for name in ROWS if name.startswith(("a role", "variables", "tools", "after a call"))}
BAD_ROWS = {
    "tools beside text": texts("2+2=", tools=TOOLS),
    "variables beside text": texts("2+2=", chat_template_kwargs={"enable_thinking": False}),
    "unknown variables": explicit(ASK, chat_template_kwargs={"no_such": 1}),
    "settings as variables": explicit(ASK, chat_template_kwargs={"tokenize": True}),
    "tools that are no list": explicit(ASK, tools={"name": "weather"}),
    "ids beside tools": {**IDS, "tools": TOOLS},
    "ids beyond the vocabulary": {**IDS, "prompt_ids": [5, 10**8]},
    "ids below 0": {**IDS, "prompt_ids": [-1]},
    "no ids": {**IDS, "prompt_ids": []},
    "no role": explicit([{"content": "Hi"}]),
    "no content": explicit([{"role": "user"}]),
    "images": explicit([user("What is it?", images=["a.png"])]),
    "weights of another kind": explicit([user("Hi"), assistant("Hello", weight=2), *ASK]),
    "a system alone": explicit([system("Be brief.")]),
    "no messages": explicit([]),
    "calls without a reply": explicit([*ASK, CALL]),
    "calls by the user": explicit([user("Hi", tool_calls=CALL["tool_calls"])]),
    "objects as JSON text": texts('[{"id": 1}]'),
    "messages as Python prints them": texts("[{'role': 'user', 'content': 'Hi'}]"),
    "nothing": texts(" "),
    "a number": texts(4),
    "half a character": texts("\ud800"),
    "the mask": texts("2+2=|<MASK>|<|MASK|>[MASK]"),
}


def _llada(shared_dir, folder):
    """LLaDA's template, which writes the assistant's header wherever a conversation ends, with another end token."""
    template = json.loads((shared_dir / "data" / "llada_8b_instruct" / "tokenizer_config.json").read_text())
    save_chat_tokenizer(folder)
    text = template["chat_template"].replace("<|eot_id|>", "<|im_end|>").replace("bos_token +", "'<|endoftext|>' +")
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return build_tokenizer("HuggingFaceTokenizer", folder)


@pytest.fixture(scope="module", params=["fast_dllm_v2_7b", "sdar_1_7b_chat", "llada"])
def tokenizer(request, tmp_path_factory):
    shared_dir = request.getfixturevalue("shared_dir")
    if request.param == "llada":
        return _llada(shared_dir, tmp_path_factory.mktemp("llada"))
    return build_tokenizer("HuggingFaceTokenizer", shared_dir / "data" / request.param, eos_token="<|im_end|>")


def _outcome(path, read):
    try:
        return read()
    except UserError as error:
        assert "\n" not in str(error)
        return str(error).removeprefix(f"{path}:1: ")


def _stored(path, kind, tokenizer, cache):
    return build_token_store(path, kind, tokenizer, cache)[0].prompt.tolist()


def _scored(path, kind, tokenizer, cache):
    """As `megatron-dtrpo score` and a run open their data."""
    config = Config()
    config.objective.objective = kind
    fill_objective_defaults(config.objective, config.model)
    config.data.data_path, config.data.data_cache_path = str(path), str(cache)
    config.data.seq_length, config.model.max_position_embeddings = 8192, 8192
    return open_data(config, tokenizer).store[0].prompt.tolist()


def _evaluated(path, kind, tokenizer, cache):
    """What periodic evaluation decodes."""
    evaluation = PeriodicEvaluation.__new__(PeriodicEvaluation)
    evaluation.data = SimpleNamespace(store=build_token_store(path, kind, tokenizer, cache))
    evaluation.tokenizer, evaluation.indices = tokenizer, [0]
    (problem,) = evaluation._problems()
    return problem.ids


@pytest.mark.parametrize("name", [*ROWS, *BAD_ROWS])
def test_one_prompt_everywhere(tmp_path, alone, tokenizer, name):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**(ROWS | BAD_ROWS)[name], "answer": "4"}) + "\n", encoding="utf-8")
    found = {"generate": _outcome(path, lambda: read_prompts(path, tokenizer, 8192)[0].ids)}
    for kind in ("sft", "preference"):
        for read in (_stored, _evaluated, _scored):
            cache = tmp_path / "cache"
            found[f"{kind}{read.__name__}"] = _outcome(path, lambda: read(path, kind, tokenizer, cache))  # noqa: B023
    assert len({json.dumps(each) for each in found.values()}) == 1, found
    if name not in OF_SOME_TEMPLATES:
        assert isinstance(found["generate"], str) == (name in BAD_ROWS), found
