"""The page in a headless Chromium, at a desk and on a phone, by day and by night; skipped where there is none."""

from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.artifact import Artifact

pytestmark = pytest.mark.slow

DESK, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 640}


@pytest.fixture(params=[(DESK, "light"), (DESK, "dark"), (PHONE, "light"), (PHONE, "dark")])
def page(request: pytest.FixtureRequest, browser: Any, searched: Artifact) -> Iterator[Any]:
    """The report; it asks for nothing but itself, and nothing goes wrong in it."""
    viewport, colours = request.param
    context = browser.new_context(viewport=viewport, color_scheme=colours)
    page = context.new_page()
    problems: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    address = f"file://{searched.path('report.html')}"
    page.goto(address)
    yield page
    context.close()
    assert problems == []
    assert [url for url in asked if not url.startswith("data:")] == [address]


def test_nothing_is_wider_than_the_screen_though_all_of_it_is_open(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wider = page.evaluate(
        """() => [...document.querySelectorAll("main *")]
            .filter(e => !e.closest(".scroll, pre, svg") && e.getBoundingClientRect().right > innerWidth)
            .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert wider == []


def test_one_drawing_of_each_figure_is_shown_and_its_words_can_be_read(page: Any) -> None:
    drawings = page.locator("figure svg:visible")
    assert drawings.count() == page.locator("figure").count() == 4
    sizes = page.evaluate(
        """() => [...document.querySelectorAll("figure svg text")]
            .map(e => e.getBoundingClientRect().height).filter(height => height > 0)"""
    )
    assert min(sizes) > 7  # pixels


def test_words_stand_out_from_their_ground(page: Any) -> None:
    """Contrast as WCAG 2.2 defines it: 4.5 for text."""
    contrast = page.evaluate(
        """() => {
            const light = colour => {
                const [r, g, b] = colour.match(/[\\d.]+/g).map(v => v / 255)
                    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const ground = light(getComputedStyle(document.body).backgroundColor);
            return [...document.querySelectorAll("main :is(p, td, th, summary, figcaption, b, a, .what)")].map(e => {
                const ink = light(getComputedStyle(e).color);
                return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
            });
        }"""
    )
    assert min(contrast) >= 4.5


def test_by_keyboard_alone_a_row_that_students_dispute_is_opened_and_closed(page: Any) -> None:
    row = page.locator("details.disputed").first
    for _ in range(60):
        page.keyboard.press("Tab")
        if row.locator("summary").evaluate("e => e === document.activeElement"):
            break
    else:
        pytest.fail("the row can't be reached")
    assert not row.locator("table").is_visible()
    page.keyboard.press("Enter")
    said = row.locator("table").inner_text()
    assert all(word in said for word in ("gold", "teacher", "standard", "step_by_step", "shuffled_rationale", "75.0 %"))
    page.keyboard.press("Space")
    assert not row.locator("table").is_visible()
