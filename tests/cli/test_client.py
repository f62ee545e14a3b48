"""The small HTTP client, against servers that behave and servers that don't."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rekindle.cli.client import Client, ServerError
from rekindle.errors import InvalidRequest

EVENTS = b'data: {"n": 1}\r\n\r\n: a comment\n\ndata: {"n": 2, "text": "\xc3\xa9"}\n\ndata: [DONE]\n\n'


@contextmanager
def server(status: int, body: bytes, kind: str = "application/json") -> Iterator[str]:
    """A server that gives one answer to everything; PATH in it is the path that was asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.replace(b"PATH", self.path.encode()))

        do_GET = do_POST  # noqa: N815  # the name is the base class's

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}"
        finally:
            http.shutdown()
            thread.join()


def test_json_comes_back() -> None:
    with server(200, b'{"status": "ok"}') as url:
        assert Client(url).get("/health") == {"status": "ok"}
        assert Client(url).post("/generate", {}) == {"status": "ok"}


def test_a_url_may_lack_its_scheme_and_have_a_path() -> None:
    with server(200, b"{}") as url:
        assert Client(url.removeprefix("http://")).get("/") == {}
        assert Client(url + "/v1/").url == url


def test_a_server_may_stand_under_a_path() -> None:
    with server(200, b'{"path": "PATH"}') as url:
        for end in ("/models/ember", "/models/ember/", "/models/ember/v1"):
            assert Client(url + end).get("/health") == {"path": "/models/ember/health"}


def test_a_missing_key_is_refused_with_how_to_give_one() -> None:
    body = b'{"error": {"message": "expected an API key, got none"}}'
    with server(401, body) as url, pytest.raises(ServerError, match=r"none; give .* --api-key or in REKINDLE_API"):
        Client(url).get("/")


def test_events_come_one_by_one_up_to_done() -> None:
    with server(200, EVENTS) as url:
        assert list(Client(url).events("/", {})) == [{"n": 1}, {"n": 2, "text": "é"}]


def test_a_stream_that_breaks_off_is_an_error() -> None:
    with server(200, b'data: {"n": 1}\n\n') as url:
        events = Client(url).events("/", {})
        assert next(events) == {"n": 1}
        with pytest.raises(ServerError, match="broke the answer off"):
            next(events)


def test_an_error_in_a_stream_is_raised() -> None:
    body = b'data: {"error": {"message": "the engine failed"}}\n\n'
    with server(200, body) as url, pytest.raises(ServerError, match="the engine failed"):
        list(Client(url).events("/", {}))


@pytest.mark.parametrize(("status", "kind"), [(400, InvalidRequest), (422, InvalidRequest), (429, ServerError)])
def test_a_refusal_carries_the_servers_words(status: int, kind: type[Exception]) -> None:
    body = b'{"error": {"message": "not like this", "code": "x"}}'
    with server(status, body) as url, pytest.raises(kind, match=rf"refused \({status}\): not like this"):
        Client(url).post("/", {})


def test_a_refusal_without_json_carries_the_status() -> None:
    with server(502, b"<html>Bad Gateway</html>") as url, pytest.raises(ServerError, match=r"\(502\): Bad Gateway"):
        Client(url).get("/")


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'"text"', b""])
def test_something_else_than_our_server_is_told(body: bytes) -> None:
    with server(200, body) as url, pytest.raises(ServerError, match="is it a Rekindle server"):
        Client(url).get("/health")


@pytest.mark.parametrize(
    "url", ["ftp://here", "http://", "", "http://[", "http://here:port", "http://here/?a=b", "http://me:word@here"]
)
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="expected a URL"):
        Client(url)


def test_a_server_that_is_not_there_is_told() -> None:
    with socket.socket() as taken:  # so that nobody else listens there
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"cannot talk to http://127.0.0.1:{port}: .*refused"):
            Client(f"http://127.0.0.1:{port}").get("/")
