"""Which panels of the dashboard have something to show: `python -m cluster.dashboard http://prometheus:9090`.

Asks a Prometheus for every expression of `grafana.json`, over all recipes.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import requests

from pipelines.console import show_table

DASHBOARD = Path(__file__).with_name("grafana.json")
_VARIABLES = {"$__rate_interval": "1m", "$recipe": ".*"}


class Panel(NamedTuple):
    """A line of the dashboard; `series` is how many it has now, `error` why Prometheus refuses it."""

    title: str
    expression: str
    series: int
    error: str | None


def expressions() -> Iterator[tuple[str, str]]:
    """(panel's title, PromQL), with Grafana's variables replaced."""
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in _VARIABLES.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression


def look(prometheus: str) -> list[Panel]:
    """What a Prometheus has of each panel.

    Raises:
        requests.RequestException: none answers there.
    """
    panels = []
    for title, expression in expressions():
        answer = requests.get(f"{prometheus}/api/v1/query", {"query": expression}, timeout=30).json()
        series = len(answer["data"]["result"]) if answer["status"] == "success" else 0
        panels.append(Panel(title, expression, series, answer.get("error")))
    return panels


def main() -> int:
    """Exit code 0 where every expression is understood."""
    if len(sys.argv) != 2:
        print("usage: python -m cluster.dashboard http://PROMETHEUS:9090", file=sys.stderr)
        return 2
    try:
        panels = look(sys.argv[1].rstrip("/"))
    except requests.RequestException as error:
        print(f"{sys.argv[1]}: no Prometheus answers there ({error})", file=sys.stderr)
        return 2
    rows = [[panel.title, panel.error or f"{panel.series:,} series", panel.expression] for panel in panels]
    show_table("The dashboard", ["panel", "has", "expression"], rows, numbers=False)
    return int(any(panel.error for panel in panels))


if __name__ == "__main__":
    sys.exit(main())
