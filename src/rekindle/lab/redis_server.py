"""A Redis or Valkey server of our own for the time of a context, on a free port of the loopback, keeping nothing."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import redis

from rekindle.lab.load.client import ServerError

_PORTS = range(15_000, 30_000)  # systems give higher ones to whoever asks for any, also before our server has its own
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_BENCHMARK_BYTES = 1 << 30  # moved by one run of it, about


@dataclass(frozen=True)
class RedisServer:
    """A server that answers."""

    port: int
    program: str  # "redis-server" or "valkey-server"

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """A connection past the network tier; a context manager."""
        return redis.Redis(port=self.port, protocol=2)

    def benchmark(self, command: str, size: int, pipeline: int) -> float | None:
        """Bytes per second of values that redis-benchmark gets or sets with one connection; None if it isn't installed."""
        program = shutil.which(self.program.replace("server", "benchmark"))
        if program is None:
            return None
        count = max(pipeline, _BENCHMARK_BYTES // size)
        wish = ["-t", "set,get" if command == "get" else "set", "-d", str(size), "-n", str(count), "-c", "1"]
        arguments = [program, "-p", str(self.port), *wish, "-P", str(pipeline), "--csv"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            name, *numbers = line.replace('"', "").split(",")
            if name.lower() == command and numbers:
                return float(numbers[0]) * size
        return None


@contextmanager
def redis_server() -> Iterator[RedisServer | None]:
    """None if neither program is installed. Raises ServerError if it doesn't start."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        yield None
        return
    server = RedisServer(free_port(), program.rpartition("/")[2])
    with tempfile.TemporaryDirectory() as folder:
        where = ["--bind", "127.0.0.1", "--port", str(server.port), "--dir", folder]
        command = [program, *where, "--save", "", "--appendonly", "no"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                _wait_for(server, process)
                yield server
            finally:
                process.terminate()
                try:
                    process.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()


def _wait_for(server: RedisServer, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with server.client() as client:
                client.ping()
            return
        except redis.ConnectionError:
            time.sleep(0.02)
    raise ServerError(f"{server.program} was started on port {server.port} and does not answer")


def free_port() -> int:
    """One that nobody else is given, before our server has it or between two of its lives."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
