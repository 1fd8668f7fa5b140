"""What a person sees."""

import pytest

from pipelines.console import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.4, "9.4 s"), (59.6, "60 s"), (60, "1 min 0 s"), (231.4, "3 min 51 s"), (7500, "2 h 5 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
