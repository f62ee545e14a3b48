"""Putting the app on a socket.

The socket is bound here, before anything runs, so that port 0 can be asked for and a port in use is told at once. It is
made with the protocol named, TCP: asyncio switches Nagle's algorithm off only then, and with it on a streamed token may
wait 40 ms for the client's acknowledgement of the one before.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from rekindle.api.answers import Runner
from rekindle.api.app import create_app
from rekindle.errors import InvalidRequest, RekindleError
from rekindle.serve.service import Service

GRACE_SECONDS = 5  # for running answers, when the server is asked to stop
KEEP_ALIVE_SECONDS = 75
_BACKLOG = 2048


class _Server(uvicorn.Server):
    """Tells when it accepts connections. Answers that run when it is to stop have `grace_seconds`, then they end."""

    def __init__(self, service: Service, ready: Callable[[], None], grace_seconds: int) -> None:
        app = create_app(service)
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=grace_seconds + 2,  # connections are cut then
            )
        )
        self._ready = ready
        self._grace_seconds = grace_seconds
        self._runner: Runner = app.state.runner

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stop = asyncio.get_running_loop().call_later(self._grace_seconds, self._runner.stop)
        await super().shutdown(sockets)
        stop.cancel()


def serve(
    service: Service, host: str = "127.0.0.1", port: int = 8000, ready: Callable[[str], None] | None = None
) -> None:
    """Serve until SIGINT or SIGTERM, then let running answers end for `GRACE_SECONDS`. Call it in the main thread.

    `ready` gets the base URL once connections are accepted. The service stays open. Raises InvalidRequest if the
    address cannot be listened on.
    """
    listener = _listen(host, port)
    url = _url(listener, host)
    server = _Server(service, lambda: ready(url) if ready else None, GRACE_SECONDS)
    # uvicorn raises the signal again when it is done: then this handler lets the caller close the service
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def running(service: Service, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """A server in a thread, for tests and scripts; gives its base URL. Raises InvalidRequest as `serve` does."""
    listener = _listen(host, port)
    ready = threading.Event()
    server = _Server(service, ready.set, grace_seconds=0)
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
        listener.close()


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
