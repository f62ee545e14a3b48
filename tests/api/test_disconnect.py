"""A client that goes away stops its generation, whatever it had asked for and wherever that was."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from rekindle.api.server import running
from rekindle.serve.request import Done, Event, Failed, Generation, Piece, Sink
from rekindle.serve.service import Service, Ticket
from rekindle.settings import Settings

CONTEXT = 4096
MOST_EVENTS = 200  # so that a generation only ends by being cancelled, however long that takes
DEADLINE_SECONDS = 120.0


class Listener:
    """Hears what the real worker tells the real sinks. After so many events that waits until all were cancelled."""

    def __init__(self, service: Service, patch: pytest.MonkeyPatch) -> None:
        self._submit = service.submit
        self._changed = threading.Condition()
        self._events: list[Event] = []
        self._is_free = False
        self.tickets: list[_Ticket] = []
        patch.setattr(service, "submit", self._listen)

    def _listen(self, generation: Generation, sink: Sink) -> Ticket:
        def both(event: Event) -> None:
            sink(event)
            with self._changed:
                self._events.append(event)
                self._changed.notify_all()
                if isinstance(event, Piece):
                    assert self._changed.wait_for(self._goes_on, DEADLINE_SECONDS)

        with self._changed:
            self.tickets.append(_Ticket(self._submit(generation, both), self._changed))
            return self.tickets[-1]

    def _goes_on(self) -> bool:
        is_over = all(ticket.is_cancelled for ticket in self.tickets)
        return self._is_free or is_over or len(self._events) < MOST_EVENTS

    def let_all(self) -> None:
        with self._changed:
            self._is_free = True
            self._changed.notify_all()

    def wait(self, happened: Callable[[list[Event]], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: happened(self._events), DEADLINE_SECONDS), self._events[-3:]

    @property
    def ends(self) -> list[str]:
        return [event.reason for event in self._events if isinstance(event, Done)]

    @property
    def num_pieces(self) -> int:
        return sum(isinstance(event, Piece) for event in self._events)


class _Ticket:
    """Knows that it was cancelled."""

    def __init__(self, ticket: Ticket, changed: threading.Condition) -> None:
        self._ticket, self._changed = ticket, changed
        self.is_cancelled = False

    def cancel(self) -> None:
        self._ticket.cancel()
        with self._changed:
            self.is_cancelled = True
            self._changed.notify_all()


@pytest.fixture(scope="module")
def long_service() -> Iterator[Service]:
    with Service.open(Settings(engine="toy", context=CONTEXT)) as service:
        yield service


@pytest.fixture(scope="module")
def address(long_service: Service) -> Iterator[tuple[str, int]]:
    with running(long_service) as url:
        host, _, port = url.removeprefix("http://").rpartition(":")
        yield host, int(port)


@pytest.fixture
def listener(long_service: Service, monkeypatch: pytest.MonkeyPatch) -> Listener:
    return Listener(long_service, monkeypatch)


def post(address: tuple[str, int], path: str, body: dict[str, Any]) -> socket.socket:
    connection = socket.create_connection(address, timeout=DEADLINE_SECONDS)
    data = json.dumps(body | {"ignore_eos": True}).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    head = "\r\n".join([*lines, "", ""])
    connection.sendall(head.encode() + data)
    return connection


ASK = {"messages": [{"role": "user", "content": "Talk for ever."}]}
LONG = {"prompt": "Talk for ever.", "max_new_tokens": 100_000}
REQUESTS = {
    "chat": ("/v1/chat/completions", ASK, 1),
    "chat of three": ("/v1/chat/completions", ASK | {"n": 3}, 3),
    "completions": ("/v1/completions", {"prompt": ["Talk", "Talk more"]}, 2),
    "responses": ("/v1/responses", {"input": "Talk for ever."}, 1),
    "generate": ("/generate", LONG, 1),
}


@pytest.mark.parametrize(("path", "body", "num"), REQUESTS.values(), ids=REQUESTS)
def test_leaving_while_waiting_for_a_whole_answer(
    address: tuple[str, int], listener: Listener, path: str, body: dict[str, Any], num: int
) -> None:
    connection = post(address, path, body)
    listener.wait(lambda events: len(events) >= 5)
    connection.close()
    listener.wait(lambda events: sum(isinstance(event, Done | Failed) for event in events) == num)
    assert listener.ends == ["cancelled"] * num


STREAMS = REQUESTS | {"generate": ("/generate_stream", LONG, 1)}


@pytest.mark.parametrize(("path", "body", "num"), STREAMS.values(), ids=STREAMS)
def test_leaving_in_the_middle_of_a_stream(
    address: tuple[str, int], listener: Listener, path: str, body: dict[str, Any], num: int
) -> None:
    connection = post(address, path, body | {"stream": True})
    received = b""
    while received.count(b"\ndata: ") < 5:
        received += connection.recv(4096)
    connection.close()
    listener.wait(lambda events: sum(isinstance(event, Done | Failed) for event in events) == num)
    assert listener.ends == ["cancelled"] * num


def test_a_cancelled_generation_makes_room(address: tuple[str, int], long_service: Service, listener: Listener) -> None:
    connections = [post(address, "/generate_stream", LONG) for _ in range(4)]
    listener.wait(lambda events: len(events) >= 20 and len(listener.tickets) == 4)
    for connection in connections:
        connection.close()
    listener.wait(lambda events: len(listener.ends) == 4)
    long_service.check_integrity()  # comes after that step
    assert (long_service.health()["running"], long_service.health()["queued"]) == (0, 0)


def test_a_client_that_never_reads_is_no_trouble_when_it_leaves(address: tuple[str, int], listener: Listener) -> None:
    connection = post(address, "/generate_stream", LONG)
    listener.wait(lambda events: len(events) >= MOST_EVENTS)
    connection.close()
    listener.wait(lambda events: listener.ends == ["cancelled"])


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", ASK), ("/generate_stream", LONG)])
@pytest.mark.parametrize("who", ["server", "service"])
def test_a_server_or_service_that_stops_ends_its_streams_with_an_error(
    path: str, body: dict[str, Any], who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service.open(Settings(engine="toy", context=CONTEXT))
    listener = Listener(service, monkeypatch)
    closing = threading.Thread(target=service.close)
    with ExitStack() as server:
        host, _, port = server.enter_context(running(service)).removeprefix("http://").rpartition(":")
        with post((host, int(port)), path, body | {"stream": True}) as connection:
            received = b""
            while received.count(b"\ndata: ") < 3:
                received += connection.recv(4096)
            if who == "server":
                server.close()
            else:
                listener.wait(lambda events: len(events) >= MOST_EVENTS)
                closing.start()
                while service._worker._inbox.empty():  # it is told to stop before it goes on
                    pass
                listener.let_all()
            while data := connection.recv(4096):
                received += data
                if received.endswith(b"\r\n0\r\n\r\n"):
                    break
    assert b'data: {"error":{"message":"the server is being stopped"' in received
    assert received.endswith(b"\r\n0\r\n\r\n"), "the stream was cut"
    assert b"[DONE]" not in received
    if who == "service":
        closing.join()
    service.close()


def test_a_server_that_stops_refuses_those_who_wait_for_a_whole_answer(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Service.open(Settings(engine="toy", context=CONTEXT)) as service:
        listener = Listener(service, monkeypatch)
        with running(service) as url:
            host, _, port = url.removeprefix("http://").rpartition(":")
            connection = post((host, int(port)), "/generate", LONG)
            listener.wait(lambda events: len(events) > 0)
        assert b" 503 " in connection.recv(4096)
        connection.close()
        assert service.health()["status"] == "ok"
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]
