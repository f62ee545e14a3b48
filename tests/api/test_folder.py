"""A server's folder over HTTP: listing, verifying, pruning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from rekindle.api.server import running
from rekindle.serve.service import Service
from rekindle.settings import Settings

STORY = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. " * 6
KEYS = ("sk-first-1f0c", "sk-second-77aa")


def good(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


@pytest.fixture
def http(tmp_path: Path) -> Iterator[httpx.Client]:
    """The built-in model with a folder, which is made in the background."""
    settings = Settings(context=1024, threads=1, store=str(tmp_path / "store"))
    with Service.open(settings) as service, running(service) as url, httpx.Client(base_url=url, timeout=60) as http:
        service._probed.result(60)
        yield http


def test_a_folder_is_listed_checked_and_pruned(http: httpx.Client, tmp_path: Path) -> None:
    assert good(http.get("/cache/list"))["total"] == 0  # nothing is written yet
    good(http.post("/cache/warm", json={"prompts": [STORY, "Grevmar lives in Babmouth. " * 10]}))
    rows = good(http.get("/cache/list"))
    assert rows["total"] == 2 and {row["text"][:7] for row in rows["prompts"]} == {"Vodris ", "Grevmar"}
    assert len(good(http.get("/cache/list?limit=1&sort=tokens"))["prompts"]) == 1
    assert good(http.get("/cache/list?blocks=true"))["total"] > 2
    assert good(http.post("/cache/verify"))["ok"]
    torn = next((tmp_path / "store").rglob("??/??/*.safetensors"))
    torn.write_bytes(b"torn")
    found = good(http.post("/cache/verify", json={"repair": True}))
    assert (found["ok"], found["torn"], found["set_aside"]) == (False, 1, 1)
    assert str(tmp_path) not in str(found)
    good(http.post("/cache/prune", json={"orphans": True}))
    would = good(http.post("/cache/prune", json={"max_size": "1KB", "dry_run": True}))
    assert would["blocks"] > 0 and good(http.get("/cache/list"))["total"] > 0
    assert good(http.post("/cache/prune", json={"max_size": 0}))["left_blocks"] == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "expected what to delete"),
        ({"max_size": "much"}, "expected a size such as 5GiB"),
        ({"max_size": -1}, "expected a size such as 5GiB"),
        ({"older_than": "long"}, "expected a time such as"),
        ({"oder_than": 5}, "did you mean 'older_than'?"),
        ({"fingerprints": ["gpt"]}, "means no model; stored: "),
    ],
)
def test_mistakes_are_told(http: httpx.Client, body: dict[str, Any], message: str) -> None:
    good(http.post("/cache/warm", json={"prompt": STORY}))
    answer = http.post("/cache/prune", json=body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert good(http.get("/cache/list"))["total"] == 1
    for query in ("limit=-1", "sort=name", "limit=99999999"):
        assert http.get(f"/cache/list?{query}").status_code == 422


def test_a_fingerprint_where_nothing_is_stored(http: httpx.Client) -> None:
    good(http.post("/cache/prune", json={"max_size": 0}))
    answer = http.post("/cache/prune", json={"fingerprints": ["gpt"]})
    assert answer.json()["error"]["message"] == "fingerprint 'gpt' means no model, for nothing is stored"


def test_a_server_without_a_folder_says_so(http: httpx.Client) -> None:
    with Service.open(Settings(engine="toy", store="none")) as service, running(service) as url:
        answer = httpx.get(f"{url}/cache/list")
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "no_folder"


def test_keys_see_their_own_prompts_alone(tmp_path: Path) -> None:
    settings = Settings(engine="toy", context=1024, store=str(tmp_path), api_key=tuple(map(SecretStr, KEYS)))
    with Service.open(settings) as service, running(service) as url:
        first, second = (httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) for key in KEYS)
        with first, second:
            good(first.post("/cache/warm", json={"prompt": STORY}))
            assert len(good(first.get("/cache/list"))["prompts"]) == 1
            assert good(second.get("/cache/list")) == {"prompts": [], "total": 0}
            assert "Vodris" not in second.get("/cache/list?blocks=true").text
