"""`priority` in requests, as vLLM names it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from rekindle.api.server import running
from rekindle.serve.observe import Observer
from rekindle.serve.run import Run
from rekindle.serve.service import Service
from rekindle.settings import Settings

REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2},
    "/v1/completions": {"prompt": "Hello.", "max_tokens": 2},
    "/generate": {"prompt": "Hello.", "max_new_tokens": 2},
}


class Seen(Observer):
    def __init__(self) -> None:
        self.priorities: list[int] = []

    def queued(self, run: Run) -> None:
        self.priorities.append(run.priority)


@pytest.fixture(scope="module")
def seen() -> Seen:
    return Seen()


@pytest.fixture(scope="module")
def http(seen: Seen) -> Iterator[httpx.Client]:
    settings = Settings(engine="toy", store="none", policy="priority")
    with (
        Service.open(settings, observers=[seen]) as service,
        running(service) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize(("given", "expected"), [({}, 0), ({"priority": None}, 0), ({"priority": -7}, -7)])
def test_a_requests_priority_reaches_the_scheduler(
    http: httpx.Client, seen: Seen, path: str, given: dict[str, Any], expected: int
) -> None:
    assert http.post(path, json=REQUESTS[path] | given).status_code == 200
    assert seen.priorities[-1] == expected


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("priority", ["high", 1.5, True, 1 << 40])
def test_what_is_no_priority_is_refused(http: httpx.Client, path: str, priority: object) -> None:
    answer = http.post(path, json=REQUESTS[path] | {"priority": priority})
    assert answer.status_code == (422 if path == "/generate" else 400)  # each API's own
    assert "priority" in answer.text
