"""Lines for people, and for machines."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pipelines.artifact import open_store
from pipelines.console import duration, say, show_table
from pipelines.examples import build_examples
from pipelines.lineage import Lineage


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], list[dict[str, Any]]]:
    """What was said since, as a machine reads it."""
    monkeypatch.setenv("DISTILL_LOG_FORMAT", "json")
    return lambda: [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_people_read_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say("  [bold] is no markup, and this line is not wrapped however long it may be, for logs are searched by line")
    assert capsys.readouterr().out == (
        "  [bold] is no markup, and this line is not wrapped however long it may be, for logs are searched by line\n"
    )


def test_machines_read_which_recipe_stage_and_key_a_line_is_about(
    lines: Callable[[], list[dict[str, Any]]], make_line: Callable[..., Lineage]
) -> None:
    line = make_line()
    build_examples(line)
    build_examples(line)
    said = lines()
    assert {(made["recipe"], made["stage"], made["key"]) for made in said} == {("small", "examples", line.examples.key)}
    assert said[-1]["message"] == f"examples {line.examples.key}: done before, skipped"
    assert all(made["time"].endswith("+00:00") for made in said)
    show_table("Rationales", ["", "train"], [["accepted", "8"]])
    [table] = lines()
    assert (table["message"], table["columns"], table["rows"]) == ("Rationales", ["", "train"], [["accepted", "8"]])


def test_threads_speak_of_their_own(lines: Callable[[], list[dict[str, Any]]], tmp_path: Any) -> None:
    store = open_store(str(tmp_path), "mine")

    def train(key: str) -> None:
        with store.artifact("train", key).lease():
            say(key)

    threads = [threading.Thread(target=train, args=(key,)) for key in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(made["key"], made["message"]) for made in lines()} == {("a", "a"), ("b", "b")}
    say("another", stage="search")
    assert [made["stage"] for made in lines()] == ["search"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.4, "9.4 s"), (59.6, "60 s"), (60, "1 min 0 s"), (231.4, "3 min 51 s"), (7500, "2 h 5 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
