"""The page in a headless Chromium, driven by keyboard and on a phone's width; skipped where there is none."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from serve.api import Students, make_api
from serve.keys import Keys
from serve.meter import Meter
from serve.settings import Limits

pytestmark = pytest.mark.slow

KEY = "open sesame"


@pytest.fixture(params=[None, KEY], ids=["open", "keyed"])
def url(request: pytest.FixtureRequest, students: Students) -> Iterator[str]:
    import hashlib

    keys = Keys([hashlib.sha256(KEY.encode()).hexdigest()]) if request.param else None
    config = uvicorn.Config(make_api(students, Limits(), keys, Meter()), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.fixture
def page(browser: Any, url: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page on a phone, with its key given where it asks for one."""
    context = browser.new_context(viewport={"width": 360, "height": 640})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    if "keyed" in request.node.name:
        page.get_by_text("a valid API key is wanted").wait_for()
        page.get_by_label("API key").fill(KEY)
        page.get_by_label("API key").press("Tab")
    page.get_by_label("message").wait_for()
    yield page
    context.close()
    assert not problems


def test_by_keyboard_alone_an_input_gets_its_label_and_bars(page: Any, students: Students) -> None:
    page.get_by_label("message").focus()
    page.keyboard.type("The lamp stopped working.")
    page.keyboard.press("Control+Enter")
    page.locator("#latency").get_by_text("ms in the server").wait_for()
    (made,) = students.pick("returns").predictor.predict(["The lamp stopped working."])  # type: ignore[attr-defined]
    assert page.locator("#label").inner_text() == made.label
    assert page.locator(".score").count() == 4
    assert page.locator(".score meter").first.get_attribute("value") is not None
    assert page.locator("#abstained").is_visible() is made.abstained


def test_an_example_fills_the_field_and_nothing_is_wider_than_a_phone(page: Any) -> None:
    page.get_by_label("Example").select_option(index=1)
    assert "lamp" in page.get_by_label("message").input_value()
    page.get_by_role("button", name="Predict").click()
    page.locator("#answer").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_another_model_has_its_own_fields(page: Any) -> None:
    page.get_by_label("Model").select_option(index=1)
    page.get_by_label("question").fill("Where is a book kept?")
    page.get_by_label("choices, one a line").fill("library\nriver")
    page.get_by_role("button", name="Predict").click()
    page.locator("#answer").wait_for()
    assert page.locator("#label").inner_text() in ("library", "river")


def test_what_a_user_writes_is_text_and_errors_are_shown(page: Any) -> None:
    page.get_by_label("Model").select_option(index=1)
    page.get_by_label("question").fill("a")
    page.get_by_label("choices, one a line").fill("<img src=x onerror=document.title='hacked'>\n<b>bold</b>")
    page.get_by_role("button", name="Predict").click()
    page.locator("#answer").wait_for()
    assert page.title() != "hacked"
    assert page.locator("#answer img, #answer b").count() == 0
    page.get_by_label("choices, one a line").fill("only one")
    page.get_by_role("button", name="Predict").click()
    page.locator("#error").get_by_text("list of 2 to 26").wait_for()
