"""`GET /metrics`: which format for whom, and numbers that are those of the requests before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from rekindle.api.metrics import wants_text
from rekindle.api.server import running
from rekindle.serve.metric_list import METRICS
from rekindle.serve.service import Service
from rekindle.settings import Settings

PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
CHROME = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


@pytest.fixture
def fresh() -> Iterator[tuple[Service, httpx.Client]]:
    """A server that has answered nothing yet."""
    with (
        Service.open(Settings(engine="toy", store="none", context=512)) as service,
        running(service) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield service, client


@pytest.mark.parametrize(
    ("accept", "text"),
    [
        (PROMETHEUS, True),
        ("text/plain", True),
        ("text/plain;version=0.0.4;q=1,*/*;q=0.1", True),
        ("application/openmetrics-text; version=1.0.0", True),
        ("TEXT/Plain", True),
        ("text/*", True),
        ("text/plain, */*", True),
        ("application/json;q=0.5, text/plain", True),
        ("*/*", False),
        ("", False),
        ("application/json", False),
        (CHROME, False),
        ("application/json, text/plain, */*", False),  # what axios sends
        ("text/plain;q=0", False),
        ("text/plain;q=0.2, application/json;q=0.9", False),
        ("image/png", False),
        (";;,q=,text/plain;q=x", True),
        ("application/*", False),
    ],
)
def test_who_gets_text(accept: str, text: bool) -> None:
    assert wants_text(accept) is text


def test_prometheus_gets_openmetrics_that_its_parser_reads(http: httpx.Client) -> None:
    response = http.get("/metrics", headers={"accept": PROMETHEUS})
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert response.headers["vary"] == "Accept"
    names = {family.name for family in parse_openmetrics(response.text)}
    of_some = {
        "rekindle_http_requests",
        "rekindle_tier_hits",
        "rekindle_tier_misses",
        "rekindle_tier_read_bytes",
        "rekindle_tier_written_bytes",
    }  # of who has answered, or has tiers
    assert {f"rekindle_{metric.name}" for metric in METRICS} - of_some <= names


def test_plain_text_is_read_by_the_parser_too(http: httpx.Client) -> None:
    response = http.get("/metrics", headers={"accept": "text/plain"})
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = {sample.name for family in parse_text(response.text) for sample in family.samples}
    assert {"rekindle_requests_total", "rekindle_cells_used", "rekindle_time_to_first_token_seconds_bucket"} <= samples
    assert not {name for name in samples if name.endswith("_created")}


def test_curl_gets_json(http: httpx.Client) -> None:
    response = http.get("/metrics", headers={"accept": "*/*"})
    assert response.headers["content-type"] == "application/json"
    assert response.headers["vary"] == "Accept"


def test_json_after_known_requests(fresh: tuple[Service, httpx.Client]) -> None:
    service, client = fresh
    before = client.get("/metrics").json()
    assert before["total_requests"] == before["total_tokens_generated"] == before["avg_ttft_sec"] == 0
    prompt = list(range(10, 110))
    body = {"prompt": prompt, "max_tokens": 7, "ignore_eos": True}
    for _ in range(3):
        assert client.post("/v1/completions", json=body).status_code == 200
    assert client.post("/v1/completions", json={"prompt": [5] * 600}).status_code == 400
    service.check_integrity()
    found: dict[str, Any] = client.get("/metrics").json()
    assert (found["total_requests"], found["total_tokens_generated"]) == (4, 21)
    assert (found["active_streams"], found["queued"], found["swapped"]) == (0, 0, 0)
    sources = {source: count for source, count in found["prompt_tokens_by_source"].items() if count}
    assert sources == {"computed": 100, "resident": 200}
    assert found["cache_hit_rate"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["cache_token_hit_rate"] == pytest.approx(2 / 3, abs=1e-4)
    assert 0 < found["avg_ttft_sec"] < found["avg_latency"]
    assert found["tokens_per_sec"] >= 0  # of the last ten seconds, in which a busy machine may have done nothing
    assert found["memory_mb"] > 10 and 0 < found["ram_percent"] <= 100 and 0 <= found["cpu_percent"] <= 100
    assert found["uptime_sec"] >= 0 and found["status"] == "ok" and found["model"] == "ember"
    assert found["tiers"]["memory"]["state"] == "ok"


def test_text_after_known_requests(fresh: tuple[Service, httpx.Client]) -> None:
    service, client = fresh
    body = {"prompt": list(range(10, 110)), "max_tokens": 7, "ignore_eos": True, "n": 2, "stream": True}
    assert client.post("/v1/completions", json=body).status_code == 200
    service.check_integrity()
    text = client.get("/metrics", headers={"accept": "text/plain"}).text
    samples = {
        (sample.name, *sample.labels.values()): sample.value for family in parse_text(text) for sample in family.samples
    }
    assert samples["rekindle_prompt_tokens_total", "computed"] == 100
    assert samples["rekindle_prompt_tokens_total", "resident"] == 100
    assert samples["rekindle_generated_tokens_total",] == 14
    assert samples["rekindle_requests_total", "length"] == 2
    assert samples["rekindle_inter_token_latency_seconds_count",] == 12
    assert samples["rekindle_http_requests_total", "POST", "/v1/completions", "200"] == 1
    assert samples["rekindle_model_info", "toy", service.engine_spec.fingerprint.hex(), "f16", "ember"] == 1


def test_scrapes_over_http_during_load(fresh: tuple[Service, httpx.Client]) -> None:
    service, client = fresh

    def ask(number: int) -> int:
        body = {"prompt": [number + 10, *range(50, 90)], "max_tokens": 20, "ignore_eos": True}
        return client.post("/v1/completions", json=body).status_code

    scraped = []
    with ThreadPoolExecutor(8) as callers:
        answers = [callers.submit(ask, number) for number in range(40)]
        while not all(answer.done() for answer in answers):
            scraped.append(client.get("/metrics").json())
    assert {answer.result() for answer in answers} == {200}
    service.check_integrity()
    scraped.append(client.get("/metrics").json())
    assert all(one["total_tokens_generated"] <= two["total_tokens_generated"] for one, two in pairwise(scraped))
    assert (scraped[-1]["total_tokens_generated"], scraped[-1]["total_requests"]) == (800, 40)
    assert sum(scraped[-1]["prompt_tokens_by_source"].values()) == 40 * 41


def test_a_scrape_does_not_wait_for_the_worker(fresh: tuple[Service, httpx.Client]) -> None:
    """While the worker is stuck in a step, which is while the engine holds still here, both formats are answered."""
    service, client = fresh
    with ThreadPoolExecutor(1) as background:

        def scrape(engine: object) -> None:
            for accept in ("text/plain", "*/*"):
                assert client.get("/metrics", headers={"accept": accept}).status_code == 200

        background.submit(service.run_on_engine, scrape).result(30)


def test_where_keys_are_set_metrics_need_one() -> None:
    settings = Settings.load(None, {}, engine="toy", store="none", context=256, api_key="sk-1")
    with Service.open(settings) as service, running(service) as url:
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/metrics", headers={"authorization": "Bearer sk-1"}).status_code == 200


def test_the_json_holds_nothing_that_json_lacks(http: httpx.Client) -> None:
    json.loads(http.get("/metrics").text, parse_constant=lambda name: pytest.fail(name))
