"""A client that goes away is gone from the engine within one step, wherever its request was: in the queue, while its
prompt is read, while it decodes; with and without streaming. Real sockets, and an engine whose steps are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from tests.api.steps import Steps, post, read_until

from rekindle.api.server import running
from rekindle.serve.request import Done
from rekindle.serve.service import Service
from rekindle.settings import Settings

WORDS = "Vodris paints in orange. " * 20
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": WORDS}], "ignore_eos": True})
TEXT = ("/v1/completions", {"prompt": WORDS, "max_tokens": 500, "ignore_eos": True})
PLAIN = ("/generate", {"prompt": WORDS, "max_new_tokens": 500, "ignore_eos": True})
PLAIN_STREAM = ("/generate_stream", PLAIN[1])
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": CHAT,
    "chat, stream": (CHAT[0], CHAT[1] | {"stream": True}),
    "text": TEXT,
    "text, stream": (TEXT[0], TEXT[1] | {"stream": True}),
    "plain": PLAIN,
    "plain, stream": PLAIN_STREAM,
}


class Scene:
    """A server with one place, whose steps wait."""

    def __init__(self, url: str, steps: Steps) -> None:
        self.url, self.steps = url, steps


@pytest.fixture(params=["toy", "ember"], scope="module")
def stage(request: pytest.FixtureRequest) -> Iterator[tuple[str, Service]]:
    engine = "toy" if request.param == "toy" else "auto"
    settings = Settings(engine=engine, context=4096, threads=1, store="none", max_running=1)
    with Service.open(settings) as service, running(service) as url:
        yield url, service


@pytest.fixture
def scene(stage: tuple[str, Service]) -> Iterator[Scene]:
    url, service = stage
    forward, submit = service._engine.forward, service.submit
    service.clear_cache()
    steps = Steps(service)
    yield Scene(url, steps)
    steps.let_all()
    steps.check_nothing_is_left()
    service._engine.forward, service.submit = forward, submit  # type: ignore[method-assign]


@pytest.mark.parametrize(("path", "body"), REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("num_steps", [1, 4], ids=["reading", "decoding"])
def test_leaving_while_a_request_runs(scene: Scene, path: str, body: dict[str, Any], num_steps: int) -> None:
    steps = scene.steps
    connection = post(scene.url, path, body)
    steps.let(num_steps - 1)
    steps.wait_until_begun(num_steps)
    (gone,) = steps.generations
    connection.close()
    steps.wait(lambda: gone.cancelled)
    assert gone.end is None
    steps.let(1)  # the step that was being taken; the next one must not compute for it any more
    steps.wait(lambda: gone.end is not None)
    assert isinstance(gone.end, Done) and gone.end.reason == "cancelled"
    steps.check_nothing_is_left()
    assert steps.begun == num_steps


@pytest.mark.parametrize(("path", "body"), REQUESTS.values(), ids=REQUESTS)
def test_leaving_while_a_request_waits(scene: Scene, path: str, body: dict[str, Any]) -> None:
    steps = scene.steps
    with ExitStack() as sockets:
        sockets.enter_context(post(scene.url, *PLAIN_STREAM))
        steps.wait_until_begun(1)
        connection = sockets.enter_context(post(scene.url, path, body))
        steps.wait(lambda: len(steps.generations) == 2)
        steps.let(2)
        steps.wait_until_begun(3)
        runs, waits = steps.generations
        assert scene.steps.service.health()["queued"] == 1 and waits.num_pieces == 0
        connection.close()
        steps.wait(lambda: waits.cancelled)
        steps.let(1)
        steps.wait_until_begun(4)
        assert isinstance(waits.end, Done) and waits.end.reason == "cancelled"
        assert waits.end.usage.completion_tokens == 0 and not runs.cancelled


def test_leaving_in_the_middle_of_the_events(scene: Scene) -> None:
    steps = scene.steps
    connection = post(scene.url, *PLAIN_STREAM)
    steps.let(5)
    steps.wait_until_begun(6)
    assert b"data: " in read_until(connection, b"\n\n")
    connection.close()
    (gone,) = steps.generations
    steps.wait(lambda: gone.cancelled)
    steps.let(1)
    steps.wait(lambda: gone.end is not None)
    assert steps.begun == 6


def test_leaving_while_the_body_is_sent(scene: Scene) -> None:
    """Nothing was submitted; the server goes on."""
    connection = post(scene.url, "/generate", {"prompt": "x"}, Expect="")
    steps = scene.steps
    steps.let_all()
    assert b" 200 " in read_until(connection, b"\r\n")
    connection.sendall(
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    connection.close()
    with post(scene.url, "/generate", {"prompt": "x"}) as other:
        assert b" 200 " in read_until(other, b"\r\n")
    assert len(steps.generations) == 2
