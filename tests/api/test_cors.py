"""Web pages of other origins: kept out unless an origin is named, let in without a key only as far as to ask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from rekindle.api.server import running
from rekindle.serve.service import Service
from rekindle.settings import Settings

PAGE, OTHER = "https://page.example", "https://other.example"
ASK = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@contextmanager
def client(**settings: Any) -> Iterator[httpx.Client]:
    with (
        Service.open(Settings(engine="toy", context=512, **settings)) as service,
        running(service) as url,
        httpx.Client(base_url=url) as client,
    ):
        yield client


def granted(answer: httpx.Response) -> str | None:
    found: str | None = answer.headers.get("access-control-allow-origin")
    return found


def test_no_other_origin_is_let_in_unless_it_is_named() -> None:
    with client() as http:
        assert http.options(CHAT, headers={"Origin": PAGE} | ASK).status_code == 405
        for answer in (http.get("/health", headers={"Origin": PAGE}), http.options(CHAT, headers={"Origin": PAGE})):
            assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("key", [None, "sk-one"])
def test_a_named_origin_may_ask_and_call(key: str | None) -> None:
    keys = {} if key is None else {"api_key": (key,)}
    own = {} if key is None else {"Authorization": f"Bearer {key}"}
    with client(cors_origin=(PAGE,), **keys) as http:
        leave = http.options(CHAT, headers={"Origin": PAGE} | ASK)  # browsers send no key with this
        assert (leave.status_code, granted(leave)) == (200, PAGE)
        assert "POST" in leave.headers["access-control-allow-methods"]
        assert leave.headers["access-control-allow-headers"] == "authorization,content-type"
        for stream in (False, True):
            answer = http.post(CHAT, headers={"Origin": PAGE} | own, json=BODY | {"stream": stream})
            assert (answer.status_code, granted(answer)) == (200, PAGE)
            assert "Origin" in answer.headers["vary"] and "access-control-allow-credentials" not in answer.headers
            assert "retry-after" in answer.headers["access-control-expose-headers"].lower()


def test_another_origin_is_not_granted_anything() -> None:
    with client(cors_origin=(PAGE,)) as http:
        assert http.options(CHAT, headers={"Origin": OTHER} | ASK).status_code == 400
        assert granted(http.post(CHAT, headers={"Origin": OTHER}, json=BODY)) is None


def test_a_page_can_read_a_refusal() -> None:
    with client(cors_origin=(PAGE,), api_key=("sk-one",)) as http:
        for path, status in ((CHAT, 401), ("/health", 405)):
            answer = http.post(path, headers={"Origin": PAGE}, json=BODY)
            assert (answer.status_code, granted(answer)) == (status, PAGE)


def test_all_origins() -> None:
    with client(cors_origin=("*",)) as http:
        for origin in (PAGE, OTHER, "null"):
            assert granted(http.options(CHAT, headers={"Origin": origin} | ASK)) == "*"
            assert granted(http.post(CHAT, headers={"Origin": origin}, json=BODY)) == "*"


# What a page needs nobody's leave for, so that only the server can refuse it.


@pytest.mark.parametrize("origin", [OTHER, "null", "http://127.0.0.1:1", "http://["])
@pytest.mark.parametrize("path", ["/cache/clear", "/cache/verify"])
def test_a_page_of_another_origin_changes_nothing(origin: str, path: str) -> None:
    with client(cors_origin=(PAGE,)) as http:
        refused = http.post(path, headers={"Origin": origin})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden_origin")
        assert "cors_origin" in refused.json()["error"]["message"]


def test_programs_own_pages_and_named_pages_may_clear() -> None:
    with client(cors_origin=(PAGE,)) as http:
        own = str(http.base_url).rstrip("/")
        for headers in ({}, {"Origin": own}, {"Origin": PAGE}):
            assert http.post("/cache/clear", headers=headers).status_code == 200


def test_reading_is_the_browsers_to_keep() -> None:
    with client() as http:
        assert http.get("/cache/stats", headers={"Origin": OTHER}).status_code == 200


NAMES = ["127.0.0.1:8000", "localhost", "a.localhost:80", "[::1]:8000", "LOCALHOST:1", "192.168.1.7"]


@pytest.mark.parametrize("name", NAMES)
def test_a_local_server_is_called_by_addresses_and_as_localhost(name: str) -> None:
    with client() as http:
        assert http.get("/cache/stats", headers={"Host": name}).status_code == 200


def test_a_name_that_points_to_this_machine_is_not_enough() -> None:
    rebound = {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}
    with client() as http:
        for answer in (http.get("/cache/list", headers=rebound), http.post("/cache/clear", headers=rebound)):
            assert answer.status_code == 403, answer.text
            assert answer.json()["error"]["code"] == "unknown_host" and "allowed_host" in answer.text
        assert http.get("/health", headers=rebound).status_code == 200


@pytest.mark.parametrize(
    "settings", [{"allowed_host": ("evil.example",)}, {"allowed_host": ("*",)}, {"api_key": ("sk-one",)}]
)
def test_names_are_free_where_they_are_allowed_or_a_key_is_asked_for(settings: dict[str, Any]) -> None:
    with client(**settings) as http:
        answer = http.get("/cache/stats", headers={"Host": "evil.example:8000", "Authorization": "Bearer sk-one"})
        assert answer.status_code == 200
