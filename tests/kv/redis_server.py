"""A real Redis (or Valkey) server on a free port, and a wire to it that can be cut."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from rekindle.lab.redis_server import free_port

PROGRAM = shutil.which("valkey-server") or shutil.which("redis-server")
needs_redis = pytest.mark.skipif(PROGRAM is None, reason="neither redis-server nor valkey-server is installed")


class RedisServer:
    """Keeps its port when it is stopped and started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.options = options
        self.folder = folder
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        where = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)]
        forgetful = ["--save", "", "--appendonly", "no"]
        assert PROGRAM is not None
        self.process = subprocess.Popen(
            [PROGRAM, *where, *forgetful, *self.options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if "Ready to accept connections" in line:
                return
        raise RuntimeError("".join(said))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)
            self.ask(b"PING")  # it may be slow to wake up

    def ask(self, *command: bytes | int) -> object:
        """One command, past the tier."""
        password = self.options[self.options.index("--requirepass") + 1] if "--requirepass" in self.options else None
        once = Retry(NoBackoff(), 0)
        with redis.Redis(port=self.port, password=password, protocol=2, socket_timeout=30, retry=once) as client:
            client.response_callbacks.clear()  # the replies as they came
            return client.execute_command(*command)


class Wire:
    """A TCP proxy that passes so many bytes of the server's answers, and then cuts all connections."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._left: int | None = None
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.port: int = self._listener.getsockname()[1]
        self._accepting = self._start(self._accept)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def cut_after(self, num_bytes: int | None) -> None:
        with self._lock:
            self._left = num_bytes

    def close(self) -> None:
        hang_up(self._listener)
        self._accepting.join()
        for end in self._ends:
            hang_up(end)
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._ends):
            end.close()

    def _start(self, target: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments)
        thread.start()
        return thread

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            self._ends += [client, server]
            self._threads += [
                self._start(self._pump, *way) for way in ((client, server, False), (server, client, True))
            ]

    def _pump(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 14):
                with self._lock:
                    if counted and self._left is not None:
                        data = data[: self._left]
                        self._left -= len(data)
                    is_cut = counted and self._left == 0
                target.sendall(data)
                if is_cut:
                    break
        hang_up(source)
        hang_up(target)


def hang_up(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
