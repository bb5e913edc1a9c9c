"""Layouts of well-known data sets, each written by `datasets` in its usual form: it trains, or one line says what to
do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dtrpo.cli import train
from megatron_dtrpo.data.prompt_records import prompt_record
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError
from tests.support.chat_tokenizer import save_chat_tokenizer
from tests.support.launch import TINY_MODEL, flags, read_metrics

datasets = pytest.importorskip("datasets")

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def ultrafeedback(folder: Path) -> Path:
    """HuggingFaceH4/ultrafeedback_binarized: a text prompt beside whole conversations, in splits of their own."""
    rows = [
        {
            "prompt": f"Question {i}?",
            "prompt_id": f"id{i}",
            "chosen": [user(f"Question {i}?"), assistant(f"Good {i}.")],
            "rejected": [user(f"Question {i}?"), assistant(f"Bad {i}.")],
            "messages": [user(f"Question {i}?"), assistant(f"Good {i}.")],
            "score_chosen": 8.5,
            "score_rejected": 6.0,
        }
        for i in range(4)
    ]
    (folder / "data").mkdir()
    for split in ("train_prefs", "test_prefs", "train_sft"):
        datasets.Dataset.from_list(rows).to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder


def hh_rlhf(folder: Path) -> Path:
    """Anthropic/hh-rlhf: two texts that begin with the same dialogue, as compressed lines in a folder a topic."""
    dialogue = "\n\nHuman: Hello {i}\n\nAssistant: Hi!\n\nHuman: How are you?\n\nAssistant:"
    rows = [
        {name: dialogue.format(i=i) + answer for name, answer in (("chosen", " Well, thanks."), ("rejected", " Go."))}
        for i in range(4)
    ]
    for topic in ("harmless-base", "helpful-base"):
        (folder / topic).mkdir()
        for split in ("train", "test"):
            path = folder / topic / f"{split}.jsonl.gz"
            datasets.Dataset.from_list(rows).to_json(str(path), compression="gzip")
    return folder


def orca(folder: Path) -> Path:
    """Intel/orca_dpo_pairs: the prompt is called question."""
    row = {"system": "Be brief.", "question": "2+2?", "chosen": "The sum is 4.", "rejected": "The sum is 5."}
    path = folder / "orca_rlhf.jsonl"
    datasets.Dataset.from_list([row] * 4).to_json(str(path))
    return path


def kto(folder: Path) -> Path:
    """trl-lib/kto-mix-14k: one answer a row, and whether it is good."""
    rows = [{"prompt": [user(f"{i}?")], "completion": [assistant(f"Yes {i}.")], "label": i % 2 == 0} for i in range(4)]
    (folder / "data").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    return folder


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "s"}}}}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"properties": {}, "required": []}}}


def tool_calls(folder: Path) -> Path:
    """Conversations with calls of tools, and the tools as columns of JSON."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    rows = [
        {"messages": [user("Cold in Oslo?"), assistant(None, tool_calls=[call])], "tools": [WEATHER, CLOCK]},
        {"messages": [user("The time?"), assistant("Noon.")], "tools": [CLOCK]},
    ]
    features = {name: datasets.List(datasets.Json()) for name in ("messages", "tools")}
    path = folder / "train.parquet"
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(str(path))
    return path


def gsm8k(folder: Path) -> Path:
    """openai/gsm8k: questions and worked answers, in a folder for each configuration."""
    rows = [{"question": f"{i}+{i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"} for i in range(4)]
    for name in ("main", "socratic"):
        (folder / name).mkdir()
        for split in ("train", "test"):
            path = folder / name / f"{split}-00000-of-00001.parquet"
            datasets.Dataset.from_list(rows).to_parquet(str(path))
    return folder


def saved(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """The same rows through ``load_dataset`` and ``save_to_disk``."""

    def write_saved(folder: Path) -> Path:
        source = folder / "source"
        source.mkdir()
        path = write(source)
        kind = "parquet" if path.suffix == ".parquet" else "json"
        data = datasets.load_dataset(kind, data_files=str(path), cache_dir=str(folder / "cache"))
        data.save_to_disk(str(folder / "saved"))
        return folder / "saved"

    return write_saved


# writer, what follows the path, settings -> (prompt, *responses) of the first example, or the line that ends the run.
SPLITS = "holds files of several splits (test_prefs: test_prefs-00000-of-00001.parquet; train_prefs: "
LAYOUTS = {
    "ultrafeedback": (ultrafeedback, "", {}, SPLITS),
    "ultrafeedback, split": (
        ultrafeedback,
        "",
        {"split": "train_prefs"},
        ("user\nQuestion 0?\nassistant\n", "Good 0.", "Bad 0."),
    ),
    "ultrafeedback, sft": (
        ultrafeedback,
        "data/train_sft*",
        {"objective": "sft"},
        ("user\nQuestion 0?\nassistant\n", "Good 0."),
    ),
    "hh-rlhf": (hh_rlhf, "", {}, "its folders harmless-base, helpful-base do; give one of them"),
    "hh-rlhf, topic": (hh_rlhf, "helpful-base", {}, "holds files of several splits (test: test.jsonl.gz; train: train"),
    "hh-rlhf, split": (
        hh_rlhf,
        "helpful-base",
        {"split": "train"},
        ("\n\nHuman: Hello 0\n\nAssistant: Hi!\n\nHuman: How are you?\n\nAssistant:", " Well, thanks.", " Go."),
    ),
    "orca": (orca, "", {}, "rename 'question' to 'prompt'"),
    "orca, saved": (saved(orca), "", {}, "rename 'question' to 'prompt'"),
    "kto": (kto, "", {}, "missing field 'chosen'"),
    "kto, sft": (kto, "", {"objective": "sft"}, "the completion is one to avoid"),
    "kto, sft, skip": (
        kto,
        "",
        {"objective": "sft", "bad_rows": "skip"},
        ("user\n0?\nassistant\n", "Yes 0."),
    ),
    "tools": (
        tool_calls,
        "",
        {"objective": "sft"},
        ("system\n", "Cold in Oslo?", '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call>'),
    ),
    "tools, saved": (
        saved(tool_calls),
        "",
        {"objective": "sft"},
        ("system\n", "Cold in Oslo?", '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call>'),
    ),
    "gsm8k": (gsm8k, "", {}, "its folders main, socratic do; give one of them"),
    "gsm8k, split": (gsm8k, "main", {"split": "train"}, "missing field 'prompt'"),
    "gsm8k, sft": (
        gsm8k,
        "main",
        {"split": "train", "objective": "sft"},
        "rename 'question' to 'prompt', 'answer' to 'completion'",
    ),
}
BY_COMMAND = ("ultrafeedback, split", "hh-rlhf, split", "orca", "kto, sft, skip", "tools, saved", "gsm8k, sft")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(tmp_path, tokenizer_folder, name):
    write, inside, settings, expected = LAYOUTS[name]
    path = write(tmp_path) / inside
    settings = dict(settings)
    kind = settings.pop("objective", "preference")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    if isinstance(expected, str):
        with pytest.raises(UserError) as caught:
            build_token_store(path, kind, tokenizer, tmp_path / "tokens", **settings)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value) and expected in str(caught.value)
        return
    example = build_token_store(path, kind, tokenizer, tmp_path / "tokens", **settings)[0]
    prompt, *responses = (tokenizer.decode(ids) for ids in (example.prompt, *example.responses))
    if name.startswith("tools"):
        assert '"name": "weather"' in prompt and '"name": "clock"' in prompt and "null" not in prompt
        assert prompt.startswith(expected[0]) and expected[1] in prompt and responses == [expected[2]]
    else:
        assert (prompt, *responses) == expected


@pytest.mark.parametrize(
    "row", [{"question": "2+2?", "answer": "4"}, {"question": "q", "chosen": "a b", "rejected": "a c"}]
)
def test_prompts_under_another_name(row):
    with pytest.raises(UserError, match="rename 'question' to 'prompt'"):
        prompt_record(row)
    assert prompt_record({**row, "prompt": row["question"]}).prompt == row["question"]


@pytest.mark.parametrize("name", BY_COMMAND)
def test_layout_by_the_real_command(tmp_path, tokenizer_folder, name, capfd, monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    write, inside, settings, expected = LAYOUTS[name]
    model = {**TINY_MODEL, "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tokenizer_folder}
    run = {"data_path": write(tmp_path) / inside, "save": tmp_path / "run", "global_batch_size": 2, "train_iters": 1}
    status = train.main(flags({**model, **run, "seq_length": 1024, "lr": 1e-3, **settings}))
    output = capfd.readouterr()
    if isinstance(expected, str):
        errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1 and expected in errors[0] and not run["save"].exists()
    else:
        assert status == 0 and len(read_metrics(run["save"])) == 1, output.err


FORMS: dict[str, Callable[[datasets.Dataset, Path], tuple[Path, str | None]]] = {
    "parquet": lambda data, folder: (_written(data.to_parquet, folder / "train.parquet"), None),
    "jsonl": lambda data, folder: (_written(data.to_json, folder / "train.jsonl"), None),
    "csv": lambda data, folder: (_written(data.to_csv, folder / "train.csv"), None),
    "saved": lambda data, folder: (_written(data.save_to_disk, folder / "saved"), None),
    "saved splits": lambda data, folder: (
        _written(datasets.DatasetDict(train=data, test=data).save_to_disk, folder / "saved"),
        "train",
    ),
}


def _written(write: Callable, path: Path) -> Path:
    write(str(path))
    return path


CALL = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
PYTHON_LISTS = (
    "is a list that is not JSON, as pandas and `datasets` write it into CSV; save the data as .jsonl or .parquet"
)
# layout -> (objective, a row, (prompt, *responses) or the line, what CSV does where it is something else)
EVERY_FORM = {
    "ultrafeedback": (
        "preference",
        {"prompt": "2+2?", "chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]},
        ("user\n2+2?\nassistant\n", "4", "5"),
        PYTHON_LISTS,
    ),
    "hh-rlhf": (
        "preference",
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        ("\n\nHuman: 2+2?\n\nAssistant:", " 4", " 5"),
        None,
    ),
    "orca": (
        "preference",
        {"system": "Be brief.", "question": "2+2?", "chosen": "It is 4.", "rejected": "It is 5."},
        "rename 'question' to 'prompt'",
        None,
    ),
    "kto": (
        "sft",
        {"prompt": [user("2+2?")], "completion": [assistant("4")], "label": True},
        ("user\n2+2?\nassistant\n", "4"),
        PYTHON_LISTS,
    ),
    "tools": (
        "sft",
        {"messages": [user("Cold?"), assistant("", tool_calls=CALL)], "tools": '[{"name": "weather"}]'},
        ("Cold?", '"name": "weather"', "Oslo"),
        PYTHON_LISTS,
    ),
    "gsm8k": ("sft", {"question": "2+2?", "answer": "#### 4"}, "rename 'question' to 'prompt', 'answer' to", None),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", EVERY_FORM)
def test_layouts_in_every_form_that_datasets_writes(tmp_path, tokenizer_folder, name, form):
    kind, row, expected, in_csv = EVERY_FORM[name]
    expected = in_csv if form == "csv" and in_csv else expected
    path, split = FORMS[form](datasets.Dataset.from_list([row] * 3), tmp_path)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    if split:
        with pytest.raises(UserError, match=r"several splits \(train, test\)"):
            build_token_store(path, kind, tokenizer, tmp_path / "tokens")
    if isinstance(expected, str):
        with pytest.raises(UserError) as caught:
            build_token_store(path, kind, tokenizer, tmp_path / "tokens", split=split)
        assert "\n" not in str(caught.value) and expected in str(caught.value), str(caught.value)
        return
    store = build_token_store(path, kind, tokenizer, tmp_path / "tokens", split=split)
    prompt, *responses = (tokenizer.decode(ids) for ids in (store[2].prompt, *store[2].responses))
    if name == "tools":
        assert expected[0] in prompt and expected[1] in prompt and expected[2] in responses[0]
    else:
        assert (prompt, *responses) == expected and len(store) == 3
