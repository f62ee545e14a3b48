"""API keys: nobody comes in without one, what one key has read is not another's, and no key is ever told."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from rekindle.api.door import OPEN_ROUTES, Door
from rekindle.api.keys import ANYBODY, Caller, Keys, Unauthorized
from rekindle.api.load import Load
from rekindle.api.server import running
from rekindle.errors import InvalidRequest
from rekindle.serve.service import Service
from rekindle.settings import Settings

ONE, TWO = "sk-first-1f0c", "sk-second-77aa"
LONG = "Vodris paints in orange. This one works as a farmer. Nouraix is based in Viniton. " * 6
CLOSED_ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/ember"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/resp_1"),
    ("DELETE", "/v1/responses/resp_1"),
    ("POST", "/generate"),
    ("POST", "/generate_stream"),
    ("GET", "/cache/stats"),
    ("POST", "/cache/clear"),
    ("POST", "/cache/pin"),
    ("GET", "/cache/pins"),
    ("DELETE", "/cache/pin/0"),
    ("POST", "/cache/warm"),
    ("GET", "/cache/list"),
    ("POST", "/cache/verify"),
    ("POST", "/cache/prune"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/no/such/route"),
    ("OPTIONS", "/v1/chat/completions"),
    ("GET", "/health/"),
    ("GET", "//health"),
]


def settings_of(keys: Sequence[str], **others: Any) -> Settings:
    return Settings(**{"store": "none", "context": 2048, "threads": 1, "api_key": tuple(keys)} | others)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Toy engine, two keys."""
    with Service.open(settings_of([ONE, TWO], engine="toy")) as service, running(service) as url:
        yield url


@pytest.fixture(scope="module")
def ember_url() -> Iterator[str]:
    """The real engine, two keys."""
    with Service.open(settings_of([ONE, TWO])) as service, running(service) as url:
        yield url
        service.check_integrity()


# Coming in.

WRONG = {
    "none": {},
    "empty": {"Authorization": "Bearer"},
    "wrong": {"Authorization": "Bearer sk-wrong"},
    "nearly": {"Authorization": f"Bearer {ONE[:-1]}"},
    "longer": {"Authorization": f"Bearer {ONE}x"},
    "no scheme": {"Authorization": ONE},
    "another scheme": {"Authorization": f"Basic {ONE}"},
    "another header, wrong": {"x-api-key": "sk-wrong"},
    "both, the first wrong": {"Authorization": "Bearer sk-wrong", "x-api-key": ONE},
    "not ASCII": {"Authorization": "Bearer ключ".encode()},
}


@pytest.mark.parametrize(("method", "path"), CLOSED_ROUTES)
def test_no_route_but_the_open_ones_lets_anybody_in(url: str, method: str, path: str) -> None:
    answer = httpx.request(method, url + path)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.request(method, url + path, headers={"x-api-key": TWO}).status_code != 401


@pytest.mark.parametrize("path", sorted(OPEN_ROUTES))
def test_open_routes_need_no_key(url: str, path: str) -> None:
    assert httpx.get(url + path).status_code == 200
    assert httpx.get(url + path, headers=WRONG["wrong"]).status_code == 200


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
def test_a_wrong_key_is_told_in_the_apis_format_and_not_repeated(url: str, headers: dict[str, Any]) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", headers=headers, json={"messages": []})
    assert answer.status_code == 401
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert "sk-" not in answer.text


@pytest.mark.parametrize("headers", [{"authorization": f"bearer  {ONE}"}, {"X-API-Key": TWO}])
def test_keys_are_taken_from_both_headers(url: str, headers: dict[str, str]) -> None:
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


def test_the_official_client(url: str) -> None:
    for key, is_known in ((ONE, True), (TWO, True), ("sk-wrong", False)):
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            if is_known:
                assert [model.id for model in client.models.list()] == ["ember"]
            else:
                with pytest.raises(openai.AuthenticationError) as refused:
                    client.models.list()
                assert refused.value.code == "invalid_api_key"


def test_a_large_body_without_a_key_is_not_read(url: str) -> None:
    answer = httpx.post(f"{url}/generate", content=b" " * (10 << 20))
    assert answer.status_code == 401


def test_a_websocket_needs_a_key_too() -> None:
    """The door itself, as no route takes one so far."""
    entered: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        entered.append(scope["path"])

    def come(headers: list[tuple[bytes, bytes]]) -> list[Message]:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            sent.append(message)

        settings = settings_of([ONE])
        door = Door(app, keys=Keys.load(settings), load=Load(settings), max_body_bytes=9)
        scope = {"type": "websocket", "path": "/v1/session", "headers": headers, "extensions": {}}
        anyio.run(door, scope, receive, send)
        return sent

    assert come([(b"x-api-key", ONE.encode())]) == [] and entered == ["/v1/session"]
    sent = come([])
    assert sent[0]["type"] == "websocket.http.response.start" and sent[0]["status"] == 401
    assert entered == ["/v1/session"]


# What is whose.

ASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}], "max_tokens": 4}),
    "text": ("/v1/completions", {"prompt": LONG, "max_tokens": 4}),
    "plain": ("/generate", {"prompt": LONG, "max_new_tokens": 4}),
}


def cached(url: str, path: str, body: dict[str, Any], key: str) -> int:
    answer = httpx.post(url + path, json=body, headers={"x-api-key": key}, timeout=60).json()
    if "timings" in answer:
        return int(answer["timings"]["cached_tokens"])
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize(("path", "body"), ASKS.values(), ids=ASKS)
def test_two_keys_share_no_token_on_the_real_engine(ember_url: str, path: str, body: dict[str, Any]) -> None:
    httpx.post(f"{ember_url}/cache/clear", headers={"x-api-key": ONE})
    first, again = (cached(ember_url, path, body, ONE) for _ in range(2))
    assert first == 0 and again > 100
    assert cached(ember_url, path, body, TWO) == 0
    assert cached(ember_url, path, body, TWO) == again


def test_a_requests_own_salt_divides_a_keys_kv_and_joins_no_two_keys(ember_url: str) -> None:
    httpx.post(f"{ember_url}/cache/clear", headers={"x-api-key": ONE})
    path, body = ASKS["text"]
    pairs = [(key, salt) for key in (ONE, TWO) for salt in ("", "team", "TEAM")]
    for key, salt in pairs:
        assert cached(ember_url, path, body | {"cache_salt": salt}, key) == 0
    for key, salt in pairs:
        assert cached(ember_url, path, body | {"cache_salt": salt}, key) > 100


def test_after_a_restart_a_key_finds_its_own_kv_on_disk_and_no_other_does(tmp_path: Path) -> None:
    path, body = ASKS["text"]
    store = {"store": str(tmp_path), "min_tokens": 1}
    with Service.open(settings_of([ONE, TWO], **store)) as service, running(service) as url:
        assert cached(url, path, body, ONE) == 0
    assert list(tmp_path.rglob("*.safetensors"))
    with Service.open(settings_of([TWO, ONE], **store)) as service, running(service) as url:
        service._store.speeds["disk"].add(1, 1e-9)
        assert cached(url, path, body, TWO) == 0
        assert cached(url, path, body, ONE) > 100
    with Service.open(settings_of([], **store)) as service, running(service) as url:
        assert cached(url, path, body, "") == 0


@given(st.lists(st.tuples(st.sampled_from([ONE, TWO, "x"]), st.text(st.characters(codec="utf-8"))), unique=True))
def test_no_two_pairs_of_key_and_salt_are_one(pairs: list[tuple[str, str]]) -> None:
    keys = Keys([("", ONE), ("", TWO), ("", "x")])
    assert len({keys.check(Headers({"x-api-key": key})).salt(salt) for key, salt in pairs}) == len(pairs)


# Where keys come from.


def test_a_key_file_has_comments_and_names(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who may ask\n\n{ONE}\n  alice : {TWO}  \n#bob:sk-bob\n")
    keys = Keys.load(settings_of(["sk-flag"], api_key_file=str(file)))
    names = {key: keys.check(Headers({"x-api-key": key})).name for key in ("sk-flag", ONE, TWO)}
    assert names == {"sk-flag": "key-1", ONE: "key-2", TWO: "alice"}
    for key in ("sk-bob", "alice", f"alice : {TWO}", "#", ""):
        with pytest.raises(Unauthorized):
            keys.check(Headers({"x-api-key": key}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "cannot read the key file .*: No such file"),
        (b"", "holds no key"),
        (b"# nothing\n\n", "holds no key"),
        (b"\xff\xfe", "not text in UTF-8"),
        (b"alice:\n", "'alice': expected printable ASCII without spaces"),
        (b"two words\n", "expected printable ASCII without spaces"),
    ],
)
def test_a_key_file_that_is_none_keeps_the_server_from_starting(
    tmp_path: Path, data: bytes | None, message: str
) -> None:
    file = tmp_path / "keys"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(InvalidRequest, match=message) as refused:
        Keys.load(Settings(api_key_file=str(file)))
    assert "two words" not in str(refused.value)


@pytest.mark.parametrize("key", ["with space", "tab\t", "ключ", ""])
def test_a_key_that_no_header_carries_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(InvalidRequest, match="'key-1': expected printable ASCII") as refused:
        Keys.load(settings_of([key]))
    assert not key or key not in str(refused.value)


def test_without_keys_everybody_may_ask() -> None:
    keys = Keys.load(Settings())
    assert not keys
    assert keys.check(Headers()) is ANYBODY and keys.check(Headers({"x-api-key": "any"})) is ANYBODY
    assert ANYBODY.salt("team") == b"team"


# What is told of them.


def test_keys_are_in_no_log_message_or_repr(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    settings = settings_of([ONE, TWO], engine="toy")
    with Service.open(settings) as service, running(service) as url:
        for key in (ONE, TWO, "sk-wrong"):
            headers = {"Authorization": f"Bearer {key}", "x-api-key": key}
            told = [httpx.get(f"{url}/v1/models", headers=headers).text]
            told.append(httpx.post(f"{url}/generate", headers=headers, json={"prompt": 5}).text)
            assert not any(secret in text for text in told for secret in (ONE, TWO, "sk-wrong"))
    keys = Keys.load(settings)
    caller = keys.check(Headers({"x-api-key": ONE}))
    shown = [repr(settings), str(settings), settings.model_dump_json(), repr(keys), repr(vars(keys)), repr(caller)]
    shown += [record.getMessage() for record in caplog.records if record.name.startswith(("rekindle", "uvicorn"))]
    assert not any(secret in text for text in shown for secret in (ONE, TWO))
    assert caller.salt().hex() not in repr(caller) and repr(caller.salt()) not in repr(caller)
    assert isinstance(settings.api_key[0], SecretStr) and isinstance(caller, Caller)
