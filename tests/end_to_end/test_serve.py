"""`megatron-dtrpo serve`: its answers are those of `generate`, for real clients, many at once, and for bad ones."""

from __future__ import annotations

import json
import math
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies

from megatron_dtrpo.cli import generate, serve, train
from tests.support.chat_tokenizer import save_chat_tokenizer
from tests.support.launch import TINY_MODEL, flags, uneven_pairs, write_lines
from tests.support.server import Server, events, serving

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from megatron_dtrpo.serving.protocol import ChatRequest, CompletionRequest  # noqa: E402

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]

POSITIONS, NEW, SLOTS, WAITING = 256, 40, 4, 70
PROMPTS = ["Tom has 3 apples. ", "x", "sixteen letters!", "A prompt that is longer than two blocks of eight. ", "Why?"]
SAMPLED = {"temperature": 1.0, "top_p": 0.9}
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "How many apples?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of random weights with a chat template, sure enough of some tokens to write several at once."""
    folder = tmp_path_factory.mktemp("serve")
    tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": save_chat_tokenizer(folder / "words")}
    model = {**TINY_MODEL, **tokenizer, "max_position_embeddings": POSITIONS, "init_method_std": 0.5}
    data = uneven_pairs(folder / "pairs.jsonl", 4)
    run = {"seq_length": 2048, "global_batch_size": 4, "train_iters": 1, "lr": 1e-9}
    assert train.main(flags({**model, **run, "data_path": data, "save": folder / "run"})) == 0
    return folder


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Server]:
    limits = {"batch_size": SLOTS, "max_waiting": WAITING, "max_request_bytes": 20_000}
    with serving(folder / "serve.log", checkpoint=folder / "run", max_new_tokens=NEW, **limits) as server:
        yield server


@pytest.fixture(scope="module")
def generated(folder) -> list[dict]:
    """What `generate` writes for the prompts with seed 7."""
    write_lines(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    files = {"checkpoint": folder / "run", "prompts": folder / "prompts.jsonl", "output": folder / "out.jsonl"}
    how = {"max_new_tokens": NEW, "seed": 7, "record_trajectory": True, **SAMPLED}
    assert generate.main(flags({**files, **how})) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def text_of(answer: tuple[int, dict]) -> str:
    status, body = answer
    assert status == 200, body
    return body["choices"][0]["text"]


def test_the_same_seed_writes_the_same_text_whatever_else_is_served(server, generated):
    def other(number: int) -> None:
        how = {"temperature": [0, 0.5, 1.5][number % 3], "top_p": 0.8, "seed": number, "max_tokens": 5 + number}
        assert server.post("/v1/completions", prompt=PROMPTS[number % 5] * (number % 4 + 1), **how)[0] == 200

    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(other, number) for number in range(24)]
        status, body = server.post("/v1/completions", prompt=PROMPTS, seed=7, logprobs=1, **SAMPLED)
        assert [one.result() for one in others] == [None] * 24
    assert status == 200
    assert len({row["completion"] for row in generated}) == len(PROMPTS)
    for choice, row in zip(body["choices"], generated, strict=True):
        assert choice["text"] == row["completion"]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert [math.exp(one) for one in choice["logprobs"]["token_logprobs"]] == pytest.approx(
            row["completion_confidence"], rel=1e-3
        )
        assert choice["finish_reason"] == ("length" if len(row["completion_ids"]) == NEW else "stop")
    assert body["usage"]["completion_tokens"] == sum(len(row["completion_ids"]) for row in generated)
    assert body["usage"]["passes"] == sum(row["completion_passes"] for row in generated)


def test_a_stream_has_a_chunk_for_each_finished_block_and_joins_to_the_whole(server, generated):
    _, text = server.post("/v1/completions", prompt=PROMPTS, seed=7, stream=True, logprobs=1, **SAMPLED)
    assert text.endswith("data: [DONE]\n\n")
    for index, row in enumerate(generated):
        mine = [one["choices"][0] for one in events(text) if one["choices"][0]["index"] == index]
        assert "".join(one["text"] for one in mine) == row["completion"]
        assert (
            sum((one["logprobs"]["tokens"] for one in mine), [])
            == list(row["completion"]) + [""] * (len(row["completion_ids"]) - len(row["completion"]))
            or not row["completion"].isascii()
        )
        assert [one["finish_reason"] is not None for one in mine] == [False] * (len(mine) - 1) + [True]
    longest = max(generated, key=lambda row: len(row["completion_ids"]))
    index = generated.index(longest)
    chunks = [one for one in events(text) if one["choices"][0]["index"] == index]
    assert len(chunks) >= len(longest["completion_ids"]) // TINY_MODEL["block_size"] - 2


def test_a_stop_string_ends_the_text_and_is_never_shown(server, generated):
    row = max(generated, key=lambda row: len(row["completion"]))
    place, whole = generated.index(row), row["completion"]
    stop = whole[12:14]
    asked = {"prompt": PROMPTS[: place + 1], "seed": 7, "stop": ["not in it", stop], "logprobs": 0, **SAMPLED}
    before = server.metrics()
    _, reply = server.post("/v1/completions", **asked)
    choice, after = reply["choices"][place], server.metrics()
    assert (choice["text"], choice["finish_reason"]) == (whole.split(stop)[0], "stop")
    counted = {name: after[name] - before[name] for name in after if name.endswith("_total")}
    assert (counted["responses_total"], counted["responses_cancelled_total"]) == (place + 1, 0)
    assert counted["tokens_total"] >= reply["usage"]["completion_tokens"]  # more where it ended by itself meanwhile
    assert len(choice["logprobs"]["tokens"]) < len(row["completion_ids"])
    _, text = server.post("/v1/completions", **asked, stream=True)
    mine = [one["choices"][0] for one in events(text) if one["choices"][0]["index"] == place]
    assert "".join(one["text"] for one in mine) == choice["text"]
    server.wait_until_idle()


def test_the_openai_package(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["run"]
    asked = {"model": "run", "messages": MESSAGES, "seed": 3, "temperature": 1.0, "n": 3}
    asked |= {"top_p": 0.95, "frequency_penalty": 0, "presence_penalty": 0, "timeout": 60}  # as LiveCodeBench asks
    whole = client.chat.completions.create(**asked, logprobs=True, max_completion_tokens=20)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3 and whole.usage.completion_tokens <= 60
    for choice in whole.choices:
        assert "".join(one.token for one in choice.logprobs.content) == choice.message.content
        assert all(one.logprob <= 0 for one in choice.logprobs.content)
    streamed, usage = ["", "", ""], None
    with client.chat.completions.create(
        **asked, max_tokens=20, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
            usage = chunk.usage or usage
    assert streamed == texts and usage == whole.usage
    for error, change in (
        (openai.NotFoundError, {"model": "gpt-4o"}),
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"presence_penalty": 0.5}),
        (openai.BadRequestError, {"max_tokens": POSITIONS}),
        (openai.BadRequestError, {"extra_body": {"top_k": 4}}),
    ):
        with pytest.raises(error) as raised:
            client.chat.completions.create(**{**asked, **change})
        assert raised.value.body["message"] and raised.value.body["type"] == "invalid_request_error"


def test_sixty_four_clients_get_their_own_streams_whole_and_in_order(server):
    def client(number: int) -> None:
        asked = {"prompt": f"{PROMPTS[number % 5]}{number}", "seed": number, "max_tokens": 24, **SAMPLED}
        _, text = server.post("/v1/completions", stream=True, **asked)
        streamed = "".join(one["choices"][0]["text"] for one in events(text))
        assert streamed == text_of(server.post("/v1/completions", **asked))

    with ThreadPoolExecutor(64) as pool:
        for done in [pool.submit(client, number) for number in range(64)]:
            done.result()
    server.wait_until_idle()


def test_clients_that_are_gone_leave_no_slot_behind(server):
    before = server.metrics()["responses_cancelled_total"]
    for number in range(200):
        asked = {"prompt": PROMPTS[number % 5], "max_tokens": 190, "seed": number, "temperature": 1.9, "n": 2}
        connection = server.send("/v1/completions", stream=True, **asked)
        if number % 2:  # after the first event; the others before it
            answer = connection.getresponse()
            answer.readline()
            answer.close()
        connection.sock and connection.sock.close()
        connection.close()
    server.wait_until_idle()
    assert server.metrics()["responses_cancelled_total"] > before + 200  # the others were finished
    assert text_of(server.post("/v1/completions", prompt="x"))


def test_a_full_queue_refuses_and_forgets_nothing(server):
    asked = {"prompt": "x", "n": 60, "temperature": 1.9, "max_tokens": 200}
    connection, answer = server.stream("/v1/completions", **asked)
    status, body = server.post("/v1/completions", **asked)
    assert (status, body["error"]["type"]) == (429, "rate_limit_error")
    assert server.get("/health") == (200, {"status": "ok"})
    connection.close()
    answer.close()
    server.wait_until_idle()


REFUSED = {
    "not JSON": ("POST", "/v1/completions", b"{", 400),
    "no prompt": ("POST", "/v1/completions", b"{}", 400),
    "half a character": ("POST", "/v1/completions", b'{"prompt": "\\ud800", "\\ud801": 1}', 400),
    "the mask": ("POST", "/v1/completions", b'{"prompt": [259]}', 400),
    "no such token": ("POST", "/v1/completions", b'{"prompt": [70000]}', 400),
    "too many": ("POST", "/v1/completions", b'{"prompt": "x", "n": 100}', 400),
    "empty": ("POST", "/v1/completions", b'{"prompt": ""}', 400),
    "a role": ("POST", "/v1/chat/completions", b'{"messages": [{"role": "dog", "content": "x"}]}', 400),
    "too long": ("POST", "/v1/completions", b" " * 30_000, 413),
    "no such page": ("GET", "/v2", None, 404),
    "wrong method": ("GET", "/v1/completions", None, 405),
    "no such model": ("GET", "/v1/models/x", None, 404),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_have_openais_form(server, name):
    method, path, body, expected = REFUSED[name]
    status, answer = server.request(method, path, body)
    assert status == expected, answer
    assert answer["error"].keys() == {"message", "type", "param", "code"} and answer["error"]["message"]


WORDS = {
    "no content type": ({"prompt": "x"}, {"Content-Type": "text/plain"}, "send 'Content-Type: application/json'", None),
    "too many stops": ({"prompt": "x", "stop": ["a"] * 17}, {}, "stop: List should have at most 16 items", "stop"),
    "an empty stop": ({"prompt": "x", "stop": [""]}, {}, "stop.0: String should have at least 1 character", "stop.0"),
    "no prompt of any form": ({"prompt": 5}, {}, "prompt: Input should be a valid string", "prompt"),
    "no such model": ({"prompt": "x", "model": "y"}, {}, "model 'y' is not served here; these are: run", None),
    "lower-case key": ({"prompt": "x", "max_tokens": 1}, {"Authorization": "bearer any"}, None, None),
}


@pytest.mark.parametrize("name", WORDS)
def test_refusals_say_what_is_wrong(server, name):
    body, headers, words, param = WORDS[name]
    status, answer = server.request("POST", "/v1/completions", json.dumps(body).encode(), headers)
    assert (status == 200) == (words is None), answer
    assert words is None or words in answer["error"]["message"] and answer["error"]["param"] == param, answer


def test_a_stream_that_waits_when_the_server_stops_is_refused_by_its_status(folder, tmp_path):
    with serving(tmp_path / "serve.log", checkpoint=folder / "run", batch_size=1, max_new_tokens=NEW) as server:
        asked = {"prompt": "x", "max_tokens": 200, "temperature": 1.9, "stream": True}
        first, second = (server.send("/v1/completions", n=n, **asked) for n in (1, 2))
        assert first.getresponse().readline().startswith(b"data: {")
        server.job.process.send_signal(signal.SIGTERM)
        answer = second.getresponse()
        assert (answer.status, answer.getheader("Retry-After")) == (503, "1")
        assert json.loads(answer.read())["error"]["code"] == "stopping"
        assert server.job.wait(60).status == 0
    assert "Traceback" not in (tmp_path / "serve.log").read_text()


def test_a_streams_head_and_first_event_come_together(server):
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(f"{head}\r\n\r\n".encode() + body)
        found = client.recv(2**16)
    assert found.startswith(b"HTTP/1.1 200 OK\r\n") and b"\r\ndata: {" in found


def test_a_client_that_still_sends_does_not_spoil_the_end(folder, tmp_path):
    with serving(tmp_path / "serve.log", checkpoint=folder / "run", max_new_tokens=NEW) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5000"
            slow.sendall(f"{head}\r\n\r\n{{".encode())
            assert server.get("/health")[0] == 200
            server.job.process.send_signal(signal.SIGTERM)
            assert server.job.wait(60).status == 0
            assert slow.recv(100).startswith(b"HTTP/1.1 503")
    assert "Traceback" not in (tmp_path / "serve.log").read_text()


ANYTHING = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers(-(2**70), 2**70)
    | strategies.floats()
    | strategies.text(strategies.characters(), max_size=20),
    lambda inner: (
        strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "\ud800"})
VALID = {
    "/v1/completions": {"prompt": "x", "max_tokens": 4},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/watch": {"prompt": "x", "max_tokens": 4},
}


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    path=strategies.sampled_from(sorted(VALID)),
    change=strategies.dictionaries(strategies.sampled_from(FIELDS), ANYTHING, max_size=3),
)
@example(path="/v1/completions", change={"temperature": 1e-300, "top_p": 1e-300})
@example(path="/v1/completions", change={"temperature": 1e-4, "top_p": 1e-9, "seed": -(2**63)})
@example(path="/v1/completions", change={"stop": ["\ud800", "a"]})
@example(path="/v1/chat/completions", change={"n": 3, "logprobs": True, "stop": "<|im_end|>"})
def test_no_request_is_an_error_of_the_servers(server, path, change):
    status, body = server.request("POST", path, json.dumps(VALID[path] | change).encode())
    assert status in (200, 400, 404), (status, body)
    assert status == 200 or body["error"]["message"]


def test_lm_evaluation_harness(server, folder, generated):
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity", reason='pip install "lm-eval[api]"')
    from lm_eval.tasks import TaskManager

    from tests.end_to_end.test_evaluate import write_task

    (folder / "tasks").mkdir()
    questions = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    answers = [
        server.post("/v1/chat/completions", messages=one, max_tokens=12, temperature=0)[1]["choices"][0]["message"]
        for one in questions
    ]
    rows = [{"question": p, "answer": a["content"]} for p, a in zip(PROMPTS, answers, strict=True)]
    write_task(
        folder,
        "served",
        [*rows, {"question": "y", "answer": "something else"}],
        "exact_match",
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["<|im_end|>"], "max_gen_toks": 12, "do_sample": False},
    )
    url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    results = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args=f"model=run,base_url={url},num_concurrent=4,max_retries=1",
        tasks=["served"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        apply_chat_template=True,
    )
    assert results["results"]["served"]["exact_match,none"] == pytest.approx(len(PROMPTS) / (len(PROMPTS) + 1))


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {}),
        (4, {"context_parallel_size": 2}),
    ],
    ids=["tensor", "pipeline", "data", "context and data"],
)
def test_layouts_write_the_same_and_stop_in_order(folder, generated, processes, layout, tmp_path):
    served = {"checkpoint": folder / "run", "max_new_tokens": NEW}
    with serving(tmp_path / "serve.log", processes, **served, batch_size=2, api_key="secret", **layout) as server:
        assert server.post("/v1/completions", prompt="x")[0] == 401
        mine = {"Authorization": "Bearer secret"}
        _, body = server.post("/v1/completions", mine, prompt=PROMPTS, seed=7, **SAMPLED)
        assert [choice["text"] for choice in body["choices"]] == [row["completion"] for row in generated]
        with ThreadPoolExecutor(1) as pool:
            asked = {"prompt": "x", "max_tokens": 150, "temperature": 1.9, "seed": 1}
            whole = text_of(server.post("/v1/completions", mine, **asked))
            late = pool.submit(server.post, "/v1/completions", mine, **asked)
            time.sleep(0.1)
            server.job.process.send_signal(signal.SIGTERM)
            assert text_of(late.result()) == whole
        assert server.job.wait(60).status in (0, 1)  # torchrun's, of a signal


def clients_process(server: Server) -> psutil.Process:
    (found,) = [one for one in psutil.Process(server.job.process.pid).children() if "spawn_main" in str(one.cmdline())]
    return found


def test_a_server_whose_clients_process_dies_ends_with_an_error(folder, tmp_path):
    with serving(tmp_path / "serve.log", checkpoint=folder / "run", max_new_tokens=NEW) as server:
        clients_process(server).kill()
        ended = server.job.wait(30)
    assert ended.status == 1
    last = (tmp_path / "serve.log").read_text().splitlines()[-1]
    assert last == "error: the process that talks to clients ended by itself (status -9)"


def test_a_server_that_is_killed_leaves_no_process_and_no_stream_open(folder, tmp_path):
    with serving(tmp_path / "serve.log", checkpoint=folder / "run", max_new_tokens=NEW) as server:
        child = clients_process(server)
        connection, answer = server.stream("/v1/completions", prompt="x", max_tokens=200, n=20, temperature=1.9)
        server.job.process.kill()
        assert events(answer.read().decode())[-1]["error"]["code"] == "stopping"
        child.wait(30)


MISTAKES = {
    "port": ({"port": 70000}, "--port 70000: it must be at most 65535"),
    "same": ({"compare": "run"}, "it is --checkpoint itself"),
    "positions": ({"inference_max_seq_length": 300}, "the model's max_position_embeddings are 256"),
    "folder": ({"compare": "nothing"}, "no such folder"),
    "address": ({"host": "300.1.1.1"}, "cannot be listened on"),
    "key": ({"api_key": "k\u00e9y"}, "characters that a header cannot carry"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(folder, name, capsys):
    change, message = MISTAKES[name]
    change = {key: folder / value if key == "compare" else value for key, value in change.items()}
    assert serve.main(flags({"checkpoint": folder / "run", "port": 0, **change})) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
