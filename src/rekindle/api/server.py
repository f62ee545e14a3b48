"""Putting the app on a socket, and how that ends.

The socket is bound here, before anything runs, so that port 0 can be asked for and a port in use is told at once. It is
made with the protocol named, TCP: asyncio switches Nagle's algorithm off only then, and with it on a streamed token may
wait 40 ms for the client's acknowledgement of the one before.

    serving --signal--> draining --all answered, or drain_seconds over--> cut --> closed
       |                    `--another signal--> the process ends at once, with 128 + its number
       `--the worker fails--> alarm (FAILURE_SECONDS, for whoever asks why) --> closed, with an error

While it drains, connections are still accepted, so that a load balancer is told and a client is asked to come back. Who
is cut gets an error in the format of its API; live sessions' answers are told to have ended, and sockets hung up on with a
reason.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from types import FrameType

import anyio
import anyio.to_thread
import uvicorn

from rekindle.api.answers import Runner
from rekindle.api.app import create_app
from rekindle.api.load import Load
from rekindle.api.sockets import LiveSessions
from rekindle.errors import EngineError, InvalidRequest, RekindleError
from rekindle.serve.service import Service

SIGNALS = (signal.SIGINT, signal.SIGTERM)
KEEP_ALIVE_SECONDS = 75
FAILURE_SECONDS = 3.0  # between the worker's failure and the end: clients read why, a probe reads /health
_CUT_SECONDS = 2  # for those who are cut to read the error
_BACKLOG = 2048


class _Server(uvicorn.Server):
    """Tells when it accepts connections, drains when it is asked to end, and ends by itself when the worker fails."""

    def __init__(self, service: Service, ready: Callable[[], None]) -> None:
        app = create_app(service)
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="websockets-sansio",
                ws_max_size=service.settings.max_body_bytes,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_CUT_SECONDS,
            )
        )
        self._service = service
        self._ready = ready
        self._load: Load = app.state.load
        self._runner: Runner = app.state.runner
        self._live: LiveSessions = app.state.live
        self._failed_at: float | None = None

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Signals are not uvicorn's: it would close the socket at the first one."""
        return nullcontext()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first asks to drain, which begins within a tenth of a second; the second can't wait."""
        if self._load.draining:
            os._exit(128 + number)
        self._load.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        anyio.get_cancelled_exc_class()  # loads what else the first stream would wait for
        await super().startup(sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: is it over?"""
        if await super().on_tick(counter) or self._load.drained:
            return True
        if self._service.alarm is None:
            self._failed_at = None  # a step that seemed to stall may come to its end
            return False
        self._failed_at = self._failed_at or time.monotonic()
        return time.monotonic() - self._failed_at >= FAILURE_SECONDS

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        self._load.drain()
        self._runner.stop()
        await anyio.to_thread.run_sync(self._live.close)
        with anyio.move_on_after(_CUT_SECONDS):  # uvicorn hangs up on sockets without a word
            while self._load.num_requests:
                await anyio.sleep(0.01)
        await super().shutdown(sockets)


def serve(
    service: Service, host: str = "127.0.0.1", port: int = 8000, ready: Callable[[str], None] | None = None
) -> None:
    """Serve until SIGINT or SIGTERM, then let running answers end for `drain_seconds`. Call it in the main thread.

    A second signal ends the process at once. `ready` gets the base URL once connections are accepted. The service stays
    open. Raises InvalidRequest if the address cannot be listened on, EngineError if the worker fails.
    """
    with closing(_listen(host, port)) as listener:
        url = _url(listener, host)
        server = _Server(service, lambda: ready(url) if ready else None)
        before = {number: signal.signal(number, server.on_signal) for number in SIGNALS}
        try:
            server.run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if (alarm := service.alarm) is not None:
        raise EngineError(f"the worker failed ({alarm}); the server cannot go on")


@contextmanager
def running(service: Service, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """A server in a thread, for tests and scripts; gives its base URL. Raises InvalidRequest as `serve` does."""
    with closing(_listen(host, port)) as listener:
        ready = threading.Event()
        server = _Server(service, ready.set)
        thread = threading.Thread(target=server.run, args=([listener],), name="rekindle-http", daemon=True)
        thread.start()
        try:
            while not ready.wait(0.05):
                if not thread.is_alive():
                    raise RekindleError("the HTTP server ended before it accepted connections")
            yield _url(listener, host)
        finally:
            server.should_exit = True
            thread.join()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InvalidRequest(f"cannot listen on {host}: {error.strerror or error}", param="host") from None
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        hint = "choose another port, or 0 for a free one"
        raise InvalidRequest(f"cannot listen on {host}:{port}: {error.strerror}; {hint}", param="port") from None
    return listener


def _url(listener: socket.socket, host: str) -> str:
    port = listener.getsockname()[1]
    shown = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
