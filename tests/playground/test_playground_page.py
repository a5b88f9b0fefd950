"""The page in a real browser, with the tiny models: all that a visitor does."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
EVIL = (
    "The <script>window.broken = 1</script> heart ${window.broken = 2} {{value}} <img src=x "
    "onerror='window.broken = 3'> pumps."
)
OPTIONS = (
    "synthesis.model=embedded:tiny-synthesizer",
    "model=embedded:tiny",
    "chat.max_new_tokens=12",
    "playground.max_characters=5000",
)
WAIT = 120_000  # milliseconds: the machine may be busy


def start(folder: Path, *options: str) -> tuple[subprocess.Popen, str]:
    """A playground, and what it says first."""
    ignored = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO")}
    process = subprocess.Popen(
        [sys.executable, "-m", "ipt", "playground", *OPTIONS, *options],
        cwd=folder, env={**ignored, "COLUMNS": "300"}, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    return process, process.stderr.readline()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("playground")
    export = folder / "outputs" / "arm" / "export"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    process, line = start(folder)
    found = re.search(r"http://127\.0\.0\.1:\d+/", line)
    assert found, line
    yield found[0]
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and "playground stopped" in said and "Traceback" not in said, (
        said
    )


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser, address):
    """A fresh visit, at whose end no other host was contacted and no error was logged."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened, complaints, requests = context.new_page(), [], []
    opened.set_default_timeout(WAIT)
    opened.on(
        "console", lambda message: message.type == "error" and complaints.append(message.text)
    )
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(address)
    opened.wait_for_selector("#write")
    yield opened
    assert opened.evaluate("window.broken") is None
    assert complaints == []
    assert (
        len(requests) > 10
        and [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    )
    context.close()


def write(page, text):
    page.fill("#text textarea", text)
    page.click("#write")
    page.wait_for_selector("#pairs .figures")
    page.wait_for_selector("#write")


def test_pairs_come_and_their_training_texts(page):
    write(page, "A tide pool stays filled with sea water when the tide goes out.")
    assert page.locator("#pairs .answer").all_inner_texts() == [
        "A term and what belongs to it.",
        "Nobody knows.",
    ]
    assert page.locator("#draws .draw").count() == 3
    first = page.locator("#draws .text").first
    assert (
        first.locator(".document").inner_text()
        == "A tide pool stays filled with sea water when the tide goes out."
    )
    assert "Seed 0" in page.inner_text("#draws")
    page.click("#others")
    page.wait_for_function("document.querySelector('#draws').innerText.includes('Seed 3')")
    page.click("#arrangement input")
    page.get_by_role("option", name="detached").click()
    page.wait_for_function("document.querySelectorAll('#draws .text').length == 6")


def test_an_example_adds_a_shot(page):
    write(page, "One is a number.")
    page.click("#keep")
    page.wait_for_selector("#examples li")
    assert page.input_value("#text textarea") == ""
    write(page, "Two is another.")
    assert "2 shots" in page.inner_text("#examples") and "2 shots" in page.inner_text(
        "#draws .facts >> nth=0"
    )
    page.click("#forget")
    page.wait_for_function("!document.querySelector('#examples li')")


def test_what_a_text_says_is_never_markup(page):
    page.fill("#text textarea", EVIL)
    page.click("#write")
    page.wait_for_selector("#pairs .figures")
    page.wait_for_selector("#draws .document")
    assert page.locator("#draws .text").first.locator(".document").inner_text() == EVIL
    page.get_by_role("tab", name="Chat with a model").click()
    page.fill("#question textarea", EVIL)
    page.press("#question textarea", "Enter")
    page.wait_for_selector("#conversation .said")
    page.wait_for_selector("#ask")
    assert page.inner_text("#conversation .asked") == EVIL


def test_a_conversation_remembers_and_begins_anew(page):
    page.get_by_role("tab", name="Chat with a model").click()
    for number in (1, 2):
        page.fill("#question textarea", f"Question {number}")
        page.press("#question textarea", "Enter")
        answers = (
            "[...document.querySelectorAll('#conversation .said')].filter(said => "
            "said.innerText.trim())"
        )
        page.wait_for_function(f"{answers}.length == {number}")
        page.wait_for_selector("#ask")
    assert page.locator("#conversation .asked").all_inner_texts() == ["Question 1", "Question 2"]
    page.click("#clear")
    page.wait_for_function("!document.querySelector('#conversation .said')")


def test_exports_are_among_the_models(page):
    page.get_by_role("tab", name="Chat with a model").click()
    page.click("#model input")
    assert page.get_by_role("option").all_inner_texts()[-1].strip().endswith("outputs/arm/export")
    page.keyboard.press("Escape")


def test_a_dropped_file(page, tmp_path):
    (tmp_path / "two.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("First text.", "Second text."))
    )
    page.set_input_files("#file input[type=file]", tmp_path / "two.jsonl")
    page.wait_for_function("document.querySelector('#text textarea').value == 'First text.'")
    page.wait_for_selector("#document")
    assert "1 to 2" in page.inner_text("#document")


@pytest.mark.parametrize(
    ("text", "message"), [("   ", "the text is empty"), ("x" * 5001, "5,001 characters, more than")]
)
def test_a_text_that_cannot_be_used(page, text, message):
    page.fill("#text textarea", text)
    page.click("#write")
    page.wait_for_selector("#pairs .error")
    assert message in page.inner_text("#pairs")
    page.wait_for_selector("#write")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(browser, address, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.wait_for_selector("#write")
    colour = {"light": "rgb(246, 247, 249)", "dark": "rgb(17, 21, 27)"}[scheme]
    page.wait_for_function(f"getComputedStyle(document.body).backgroundColor == '{colour}'")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


def test_a_port_that_is_taken(tmp_path, address):
    port = address.rsplit(":", 1)[1].strip("/")
    process, line = start(tmp_path, f"playground.port={port}")
    assert process.wait(timeout=300) == 1
    assert (
        line.startswith(f"error: playground.port={port} is taken") and process.stderr.read() == ""
    )


def test_an_end_in_the_middle_of_an_answer(tmp_path, browser):
    process, line = start(tmp_path, "chat.max_new_tokens=1900")
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    page.goto(re.search(r"http://\S+", line)[0])
    page.get_by_role("tab", name="Chat with a model").click()
    page.fill("#question textarea", "The heart")
    page.press("#question textarea", "Enter")
    page.wait_for_function("document.querySelector('#conversation .said')?.innerText.length > 20")
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and "Traceback" not in said, said
    assert time.monotonic() - asked < 300
    page.close()
