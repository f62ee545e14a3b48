"""The dashboard in deploy/ and the table in docs/metrics.md name the metrics that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rekindle.cli.reference import replace_part
from rekindle.serve.metric_list import METRICS, metrics_table
from rekindle.serve.service import Service
from rekindle.settings import Settings

ROOT = Path(__file__).parent.parent
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
NAME = re.compile(r"\b(?:rekindle|process)_[a-z_]+")
OF_THE_SCRAPE = {"instance", "le"}  # labels that Prometheus adds, or a histogram has


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[str]]]:
    """Labels of every sample that a server with a slower tier has."""
    store = tmp_path_factory.mktemp("store")
    with Service.open(Settings(engine="toy", store=str(store), context=256)) as service:
        service.metrics.answered("GET", "/health", 200)
        families = list(service.metrics.registry.collect())
    found: dict[str, set[str]] = {}
    for sample in (sample for family in families for sample in family.samples):
        found.setdefault(sample.name, set()).update(sample.labels)
    yield found


def expressions() -> list[tuple[str, str]]:
    return [(target["expr"], target["legendFormat"]) for panel in PANELS for target in panel["targets"]]


@pytest.mark.parametrize(("expression", "legend"), expressions(), ids=lambda text: text[:60])
def test_a_query_names_what_there_is(expression: str, legend: str, samples: dict[str, set[str]]) -> None:
    names = NAME.findall(expression)
    assert names and set(names) <= set(samples)
    assert all(expression.count(opening) == expression.count(closing) for opening, closing in ("()", "{}", "[]"))
    kept = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in re.split(r",\s*", group)}
    matched = set(re.findall(r"(\w+)=~?\"", expression))
    labels = set.union(*(samples[name] for name in names)) | OF_THE_SCRAPE
    assert kept | matched | set(re.findall(r"{{(\w+)}}", legend)) <= labels
    if kept:
        assert set(re.findall(r"{{(\w+)}}", legend)) <= kept


@pytest.mark.parametrize(("expression", "legend"), expressions(), ids=lambda text: text[:60])
def test_counters_are_asked_for_their_rate_and_gauges_are_not(expression: str, legend: str) -> None:
    for name in NAME.findall(expression):
        is_rate = f"rate({name}{{" in expression or f"increase({name}{{" in expression
        assert is_rate == name.endswith(("_total", "_bucket"))


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {name.removesuffix("_bucket") for expression, _ in expressions() for name in NAME.findall(expression)}
    assert {metric.full_name for metric in METRICS} <= shown


def test_panels_have_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_it_has_its_rows_and_asks_for_its_data_source() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Requests", "Latency", "Tokens by source", "Cache", "Tiers", "Cells", "Live sessions"]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"}
    assert used == variables == {"datasource", "instance"}


def test_the_documentation_lists_all_metrics() -> None:
    text = (ROOT / "docs/metrics.md").read_text("utf-8")
    assert replace_part(text, "metrics", metrics_table()) == text, (
        "run: python -m rekindle.cli.reference docs/metrics.md"
    )


def test_the_documentation_lists_all_of_the_json() -> None:
    from rekindle.api.metrics import Machine, overview

    with Service.open(Settings(engine="toy", store="none", context=256)) as service:
        names = {*overview(service), *Machine().numbers()}
    text = (ROOT / "docs/metrics.md").read_text("utf-8")
    table = text.partition("### The JSON")[2].partition("## ")[0]
    assert {
        name
        for row in table.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    } == names
