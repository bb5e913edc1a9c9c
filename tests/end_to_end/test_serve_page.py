"""The server's page, as a browser shows it: a prompt in, tokens unmask, two checkpoints side by side, the keyboard."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dtrpo.cli import train
from tests.support.chat_tokenizer import save_chat_tokenizer
from tests.support.launch import TINY_MODEL, flags, uneven_pairs
from tests.support.server import Server, serving

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = (
    '</script><script>window.hacked = 1</script><img src="http://127.0.0.1:9/x" onerror="window.hacked = 2"> &amp;'
)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """Two checkpoints of random weights, of a byte tokenizer and of one with a chat template."""
    folder = tmp_path_factory.mktemp("page")
    data = uneven_pairs(folder / "pairs.jsonl", 4)
    words = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": save_chat_tokenizer(folder / "words")}
    for name, more in (("aligned", words), ("base", {"seed": 5})):
        model = {**TINY_MODEL, "max_position_embeddings": 512, "init_method_std": 0.5, **more}
        run = {"seq_length": 2048, "global_batch_size": 4, "train_iters": 1, "lr": 1e-9}
        assert train.main(flags({**model, **run, "data_path": data, "save": folder / name})) == 0
    both = {"checkpoint": folder / "aligned", "compare": folder / "base"}
    with serving(folder / "serve.log", **both, batch_size=2, api_key="secret") as server:
        yield server


@pytest.fixture
def page(server) -> Iterator:
    """The page, just opened. It may ask nobody but its server."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    requests: list[str] = []
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        with driver.chromium.launch(executable_path=executable, args=flags) as browser:
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.on("request", lambda request: requests.append(request.url))
            tab.goto(f"http://127.0.0.1:{server.port}/")
            yield tab
            assert tab.evaluate("window.hacked") is None
    here = f"http://127.0.0.1:{server.port}/"
    assert {url for url in requests if not url.startswith("data:")} <= {here, here + "watch"}


def wait_for(page, condition: str) -> None:
    """As `wait_for_function`, which would evaluate text in the page, where its policy forbids that."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{condition}: {page.locator('.status').all_text_contents()}")


def test_a_prompt_is_answered_by_both_while_one_watches(server, page, tmp_path):
    texts = "[...document.querySelectorAll('.column .completion')].map(each => each.textContent)"
    settled = "[...document.querySelectorAll('.replay')].every(each => !each.disabled)"
    assert page.locator(".column h2").all_text_contents() == ["aligned", "base"]
    page.keyboard.type("Tom has")  # the prompt has the focus
    page.keyboard.press("Shift+Enter")
    page.keyboard.type(HOSTILE)
    page.fill("#longest", "60")
    page.uncheck("#chat") if page.is_visible("#chat") else None
    page.focus("#prompt-text")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-choice:not([hidden])")
    page.wait_for_selector(".status.error")
    page.fill("#key", "secret")
    # Seen on the way: how many tokens are masked and how many are not, whenever either changes.
    page.evaluate(
        "window.seen = []; new MutationObserver(() => seen.push("
        "[document.querySelectorAll('.token.masked').length, document.querySelectorAll('.token:not(.masked)').length]"
        ")).observe(document.getElementById('columns'), { childList: true, subtree: true })"
    )
    page.focus("#prompt-text")
    page.keyboard.press("Enter")
    wait_for(page, settled)
    seen = page.evaluate("seen")
    assert any(masked and shown for masked, shown in seen), "tokens unmask one after the other"
    shown = page.evaluate(texts)
    prompt, mine = f"Tom has\n{HOSTILE}", {"Authorization": "Bearer secret"}
    for model, text in zip(("aligned", "base"), shown, strict=True):
        asked = {"model": model, "prompt": prompt, "max_tokens": 60, "seed": 1234}
        status, body = server.post("/v1/completions", mine, **asked)
        assert status == 200 and body["choices"][0]["text"] == text
    facts = page.locator(".facts dd").all_text_contents()
    for passes, tokens, rate, seconds in (facts[:4], facts[4:]):
        assert float(rate) == pytest.approx(int(tokens) / int(passes), abs=0.006) and float(seconds) > 0

    picture = page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert len(picture) > 10_000
    if folder := os.environ.get("MEGATRON_DTRPO_SCREENSHOTS"):
        shutil.copy(tmp_path / "page.png", Path(folder) / "serve.png")
    boxes = page.evaluate("[...document.querySelectorAll('.column')].map(each => each.getBoundingClientRect().left)")
    assert boxes[1] - boxes[0] > 400, "side by side"

    page.focus(".replay")
    page.keyboard.press("Home")
    first = page.evaluate(texts)
    assert 0 < len(first[0]) < len(shown[0]) and first[1] == shown[1]
    page.keyboard.press("ArrowRight")
    assert len(first[0]) <= len(page.evaluate(texts)[0])
    page.keyboard.press("End")
    assert page.evaluate(texts) == shown


def test_escape_stops_it_and_frees_the_slots(server, page):
    page.evaluate("document.getElementById('key-choice').hidden = false")
    page.fill("#key", "secret")
    page.fill("#longest", "400")
    page.fill("#temperature", "1.9")
    page.fill("#prompt-text", "x")
    statuses = "[...document.querySelectorAll('.status')].map(each => each.textContent)"
    for seed in range(30):  # a response may be finished before the key is pressed
        page.fill("#seed", str(seed))
        page.focus("#prompt-text")
        page.keyboard.press("Enter")
        page.wait_for_selector(".token:not(.masked)")
        page.keyboard.press("Escape")
        wait_for(page, f"{statuses}.every(each => each === 'stopped' || each.startsWith('step '))")
        if "stopped" in page.evaluate(statuses):
            break
    else:
        raise AssertionError("no response was ever stopped")
    for _ in range(100):
        _, text = server.get("/metrics", {"Authorization": "Bearer secret"})
        if "requests_running 0\n" in text:
            break
        page.wait_for_timeout(50)
    else:
        raise AssertionError(text)
