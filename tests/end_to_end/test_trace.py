"""The page that replays decodings, as a browser shows it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.diffusion.decoding import Completion, Discarded
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.inference.trace import DiscardedToken, Trace, trace_page
from megatron_dtrpo.inference.trace import trace_of as trace_of_completion

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
Page = playwright.Page
pytestmark = pytest.mark.end_to_end

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

TITLE = 'A <i>title</i> & "quotes" {{data}} \x00\ud800'
HOSTILE = (
    '</script><script>window.hacked = 1</script><img src="http://127.0.0.1:9/x" onerror="window.hacked = 2"> &amp;'
)


def trace_of(prompt: str, token_texts: tuple[str, ...], steps: tuple[int, ...], first_block: int = 2) -> Trace:
    """A trace of blocks of four tokens."""
    n = len(token_texts)
    confidence = tuple(1 - i / (2 * n) + 1e-6 for i in range(n))
    return Trace(
        prompt, token_texts, steps, confidence, tuple(first_block + i // 4 for i in range(n)), "".join(token_texts)
    )


TRACES = (
    trace_of(
        HOSTILE,
        ("48", " /", " ", "2", " =", " 24", "\n\n", "  so", "", "\u4e2d", ""),
        (0, 2, 0, 1, 4, 3, 3, 4, 6, 6, 6),
    ),
    trace_of(
        "<b>second</b>\nline", (" <!--", "</script>", "\t\x07", "\ud83d", "\r\n\u2028", ""), (1, 0, 1, 2, 3, 2), 9
    ),
    trace_of("nothing", (), ()),
    replace(
        trace_of("ends early", ("a", "b", ""), (0, 1, 4)),
        discarded=(
            DiscardedToken(4, "later", step=2, until=4, confidence=0.25, block=3),
            DiscardedToken(6, "", step=3, until=4, confidence=0.5, block=3, ends=True),
        ),
    ),
)


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """A tab of the system's own browser, which Playwright drives."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        # The sandbox refuses to run as root; containers have no /dev/shm or a small one.
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        with driver.chromium.launch(executable_path=executable, args=flags) as browser:
            yield browser.new_page(viewport={"width": 1280, "height": 900})


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    file: Path = tmp_path_factory.mktemp("page") / "trace.html"
    file.write_text(trace_page(TRACES, TITLE), encoding="utf-8")
    return file.as_uri()


@pytest.fixture
def opened(tab, url) -> Iterator[Page]:
    """The page, just opened. What it may never do is looked for when the test is over."""
    complaints, requests = [], []
    listeners = {
        "pageerror": lambda error: complaints.append(error),
        "console": lambda message: complaints.append(message.text),
        "request": lambda request: requests.append(request.url),
    }
    tab.goto("about:blank")
    for event, listener in listeners.items():
        tab.on(event, listener)
    tab.goto(url)
    yield tab
    assert tab.evaluate("window.hacked") is None  # by now events up to here have been received
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert complaints == []
    assert [request.partition("#")[0] for request in requests if not request.startswith("data:")] == [url]


def completion(page: Page) -> str:
    """The text shown. As UTF-16 code units on the way here: a lone surrogate would not survive it."""
    text = "document.getElementById('completion').textContent"
    units = page.evaluate(f"Array.from({{ length: {text}.length }}, (_, i) => {text}.charCodeAt(i))")
    return "".join(map(chr, units))


def shown_by(trace: Trace, step: int) -> str:
    return "".join(token_text for token_text, at in zip(trace.token_texts, trace.steps, strict=True) if at <= step)


def set_value(page: Page, name: str, value: int, event: str) -> None:
    page.evaluate(
        f"{{ const e = document.getElementById('{name}'); e.value = {value};"
        f" e.dispatchEvent(new Event('{event}', {{ bubbles: true }})); }}"
    )


def number(page: Page, name: str) -> str:
    return page.evaluate(f"document.getElementById('{name}').textContent")


def test_opens_at_the_first_step_with_prompt_and_title_as_text(opened):
    assert opened.evaluate("document.getElementById('step').value") == "0"
    assert completion(opened) == "48 "
    assert number(opened, "prompt") == HOSTILE
    shown = 'A <i>title</i> & "quotes" {{data}} \ufffd\ufffd'
    assert opened.evaluate("[document.title, document.querySelector('h1').textContent]") == [shown, shown]
    assert opened.evaluate("document.querySelectorAll('script, img, i[onerror]').length") == 2


@pytest.mark.parametrize("index", [0, 1])
def test_slider_shows_the_tokens_up_to_its_step(opened, index):
    trace = TRACES[index]
    set_value(opened, "trace", index, "change")
    assert number(opened, "prompt") == trace.prompt
    steps = range(max(trace.steps) + 1)
    assert opened.evaluate("document.getElementById('step').max") == str(steps[-1])
    for step in [*steps, *reversed(steps)]:
        set_value(opened, "step", step, "input")
        assert completion(opened) == shown_by(trace, step)
        count = sum(at <= step for at in trace.steps)
        assert number(opened, "where") == f"step {step + 1} of {len(steps)}"
        assert number(opened, "tokens") == f"{count} of {len(trace.token_texts)}"
        assert number(opened, "rate") == f"{count / (step + 1):.2f}"
        new = opened.evaluate("[...document.querySelectorAll('.token.new')].map(e => +e.dataset.index)")
        assert new == [i for i, at in enumerate(trace.steps) if at == step]
    set_value(opened, "step", steps[-1], "input")
    assert completion(opened) == trace.text
    assert opened.evaluate("[...document.querySelectorAll('.block')].map(e => +e.dataset.block)") == sorted(
        set(trace.blocks)
    )


def test_nothing_moves_when_tokens_appear(opened):
    places = "JSON.stringify([...document.querySelectorAll('.token')].map(e => e.getBoundingClientRect()))"
    before = opened.evaluate(places)
    set_value(opened, "step", 6, "input")
    assert completion(opened) == TRACES[0].text
    assert opened.evaluate(places) == before


def test_no_tokens(opened):
    set_value(opened, "trace", 2, "change")
    assert (completion(opened), number(opened, "where"), number(opened, "tokens")) == ("", "no tokens", "0 of 0")


GHOSTS = """[...document.querySelectorAll('.ghost')].map(e => ['masked', 'new', 'discarded'].filter(
    state => e.classList.contains(state)).join(' '))"""


def test_what_was_thrown_away_is_shown_as_such_and_is_no_text(opened):
    """As long as it stood there it is drawn as the other tokens are, in its place behind them; then struck out."""
    keys = opened.locator(".if-discarded")
    assert [keys.nth(i).is_visible() for i in range(keys.count())] == [False, False]
    set_value(opened, "trace", 3, "change")
    assert all(keys.nth(i).is_visible() for i in range(keys.count()))
    assert "thrown away" in keys.last.inner_text()
    assert opened.evaluate("[...document.querySelectorAll('.token')].map(e => e.dataset.text)")[3:] == ["later", ""]
    box = "JSON.stringify([...document.querySelectorAll('.ghost')].map(e => e.getBoundingClientRect()))"
    before, trace, states = opened.evaluate(box), TRACES[3], {}
    for step in [0, 1, 2, 3, 4, 3, 2]:
        set_value(opened, "step", step, "input")
        states[step] = opened.evaluate(GHOSTS)
        assert completion(opened) == shown_by(trace, step)
        assert opened.evaluate(box) == before
        assert number(opened, "fresh") == "1"
        assert number(opened, "thrown") == ("2" if step == 4 else "0")
    assert states == {
        0: ["masked", "masked"],
        1: ["masked", "masked"],
        2: ["new", "masked"],
        3: ["", "new"],
        4: ["discarded", "discarded"],
    }
    lines = "getComputedStyle(document.querySelector('.ghost')).textDecorationLine"
    assert opened.evaluate(lines) == "none"
    set_value(opened, "step", 4, "input")
    assert opened.evaluate(lines) == "line-through"
    opened.evaluate("document.querySelectorAll('.ghost')[1].focus()")
    assert opened.locator("#tip").inner_text().split("\n") == [
        "end token",
        "appeared in step 4 of 5",
        "thrown away in step 5, which wrote an end token before it",
        "confidence 50.0%",
        "block 3",
    ]


def test_play_goes_to_the_end_and_stops(opened):
    set_value(opened, "speed", 16, "change")
    opened.evaluate("document.getElementById('play').click()")
    assert number(opened, "playing") == "Pause"
    playwright.expect(opened.locator("#step")).to_have_value("6")
    playwright.expect(opened.locator("#playing")).to_have_text("Play")
    assert completion(opened) == TRACES[0].text


def test_keys(opened):
    position = "document.getElementById('step').value"
    for key, expected in (("ArrowRight", "1"), ("ArrowRight", "2"), ("ArrowLeft", "1")):
        opened.keyboard.press(key)
        assert opened.evaluate(position) == expected
    opened.evaluate("document.getElementById('step').focus()")
    opened.keyboard.press("Space")
    assert number(opened, "playing") == "Pause"
    playwright.expect(opened.locator("#step")).not_to_have_value("1")
    opened.keyboard.press("Space")
    assert number(opened, "playing") == "Play"


def test_tooltip_and_what_it_does_not_give_away(opened):
    tip = "document.getElementById('tip').hidden ? null : document.getElementById('tip').innerText"
    opened.evaluate("document.querySelector('[data-index=\"2\"]').focus()")
    assert opened.evaluate(tip).split("\n") == [
        "\u201c \u201d",
        "appeared in step 1 of 7",
        "confidence 90.9%",
        "block 2",
    ]
    opened.evaluate("document.querySelector('[data-index=\"5\"]').focus()")
    assert opened.evaluate(tip).split("\n") == ["masked", "appears in step 4 of 7", "block 3"]
    opened.evaluate("document.activeElement.blur()")
    assert opened.evaluate(tip) is None


def test_the_address_chooses_trace_and_step(tab, url):
    for fragment, index, step in (("#trace=2&step=3", 1, 2), ("#step=last", 0, 6), ("#trace=99&step=x", 3, 0)):
        tab.goto("about:blank")
        tab.goto(url + fragment)
        assert completion(tab) == shown_by(TRACES[index], step)
        assert tab.evaluate("document.getElementById('trace').selectedIndex") == index
    set_value(tab, "trace", 0, "change")
    set_value(tab, "step", 4, "input")
    assert tab.evaluate("location.hash") == "#trace=1&step=5"


def test_one_trace_needs_no_chooser_and_a_phone_no_sideways_scrolling(tab, tmp_path):
    file = tmp_path / "one.html"
    file.write_text(trace_page([trace_of("p" * 300, ("x" * 300, "y"), (0, 1))], "t" * 99), encoding="utf-8")
    size = {"width": 360, "height": 640}
    with tab.context.browser.new_page(viewport=size, device_scale_factor=2, is_mobile=True) as phone:
        phone.goto(file.as_uri())
        assert phone.evaluate("document.getElementById('chooser').hidden")
        assert phone.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": (0,)}, "trace 2: 1 steps for 6 tokens"),
        ({"text": "other"}, "trace 2: token_texts do not join to the text"),
        ({"steps": (0, 0, 0, 0, 0, -1)}, "trace 2: a step is below 0"),
        ({"discarded": (DiscardedToken(5, "x", 0, 1, 0.5, 10),)}, "trace 2: a discarded token stands in the response"),
        ({"discarded": (DiscardedToken(6, "x", 1, 1, 0.5, 10),)}, "trace 2: a discarded token was thrown away before"),
        ({"discarded": (DiscardedToken(6, "x", 0, 1, 1.5, 10),)}, "trace 2: a confidence is not a probability"),
        ({"confidence": (0.0, 0.5, 1.0, 1.0, 1.0, float("nan"))}, "trace 2: a confidence is not a probability"),
    ],
)
def test_contradictions_are_user_errors(change, message):
    with pytest.raises(UserError, match=message):
        trace_page([TRACES[0], replace(TRACES[1], **change)], "title")
    with pytest.raises(UserError, match="none given"):
        trace_page([], "title")


def test_a_completions_trace_holds_what_it_threw_away():
    tokenizer = build_tokenizer("ByteLevelTokenizer", None)
    end, (a, b, stop) = tokenizer.eos_id, b"ab;"
    thrown = [
        Discarded(place=5, token=end, step=1, until=3, confidence=0.2),
        Discarded(place=2, token=b, step=0, until=3, confidence=0.4),
        Discarded(place=4, token=stop, step=2, until=3, confidence=0.3),
    ]
    completion = Completion([a, end], [0, 3], [0.9, 0.8], [6, 7], passes=5, ended=True, discarded=thrown)
    trace = trace_of_completion("p", completion, tokenizer, [stop])
    assert (trace.token_texts, trace.text, trace.blocks) == (("a", ""), "a", (6, 7))
    assert trace.discarded == (
        DiscardedToken(2, "b", 0, 3, 0.4, block=7),
        DiscardedToken(4, ";", 2, 3, 0.3, block=7, ends=True),
        DiscardedToken(5, "", 1, 3, 0.2, block=7, ends=True),
    )
    assert trace_page([trace], "title")
