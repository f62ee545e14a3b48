"""The little of RESP2 that a tier needs (https://redis.io/docs/latest/develop/reference/protocol-spec/).

A reply of a megabyte is received into its final place, so it is copied once; and the time-out is one for the whole of an
operation, so a peer that trickles can't hold a request. (The usual client library copies a reply three times, took four
times as long for blocks of 1.4 MB, and times out between bytes only.)
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from rekindle.errors import InvalidRequest

DEFAULT_PORT = 6379
_SCHEMES = {"redis": False, "valkey": False, "rediss": True, "valkeys": True}  # scheme -> TLS
_RECEIVE_BYTES = 1 << 16
_MAX_BULK_BYTES = 512 << 20  # the server's own limit
_SKIP_SECONDS = 0.005
_JOIN_BYTES = 1 << 14  # smaller parts are sent together

Command = Sequence[bytes | int]
Reply = Any  # bytearray, bytes, int, None, a list of replies, or Refused


class Refused(Exception):
    """The server's answer is an error; the connection is as good as before."""


class ProtocolError(OSError):
    """What came is not RESP2."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where a server is and how to be let in. Its text never has the password."""

    host: str
    port: int
    database: int
    tls: bool
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, password: str | None = None) -> Server:
        """From redis://[[user]:password@]host[:port][/db], or valkey, rediss, valkeys. Raises InvalidRequest."""
        expected = "a store's URL like redis://host:port/db (or valkey, rediss, valkeys) expected"
        try:
            parts = urlsplit(url)
            port, path = parts.port, parts.path.strip("/")
            database = int(path) if path else 0
        except ValueError:
            raise InvalidRequest(f"{expected}, got one whose port or db is no number", param="store_url") from None
        if parts.scheme not in _SCHEMES:
            raise InvalidRequest(f"{expected}, got one with the scheme {parts.scheme!r}", param="store_url")
        if not parts.hostname or database < 0 or parts.query or parts.fragment:
            raise InvalidRequest(f"{expected}, got one without a host or with more behind it", param="store_url")
        own = unquote(parts.password) if parts.password else None
        return cls(
            host=parts.hostname,
            port=port or DEFAULT_PORT,
            database=database,
            tls=_SCHEMES[parts.scheme],
            username=unquote(parts.username) if parts.username else None,
            password=own or password,
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.database}"


class Connection:
    """One connection, let in and at its database. Not thread-safe; after any OSError it must be closed."""

    def __init__(self, server: Server, timeout_seconds: float) -> None:
        """Raises OSError, or Refused for a wrong password or database."""
        self._timeout = timeout_seconds
        self._max_bulk_bytes = _MAX_BULK_BYTES
        self._ahead = bytearray()  # received beyond the last reply
        self._socket = socket.create_connection((server.host, server.port), timeout_seconds)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if server.tls:
                self._socket = ssl.create_default_context().wrap_socket(self._socket, server_hostname=server.host)
            if server.password is not None:
                user = [] if server.username is None else [server.username.encode()]
                self._demand([b"AUTH", *user, server.password.encode()])
            if server.database:
                self._demand([b"SELECT", server.database])
        except BaseException:
            self._socket.close()
            raise

    def send(self, commands: Sequence[Command]) -> None:
        """All of it within the time-out."""
        self._socket.settimeout(self._timeout)
        small = bytearray()
        for command in commands:
            small += b"*%d\r\n" % len(command)
            for part in command:
                data = b"%d" % part if isinstance(part, int) else part
                small += b"$%d\r\n" % len(data)
                if len(data) > _JOIN_BYTES:
                    self._socket.sendall(small)
                    self._socket.sendall(data)
                    small = bytearray(b"\r\n")
                else:
                    small += data + b"\r\n"
        self._socket.sendall(small)

    def receive(self) -> Reply:
        """The next reply, all of it within the time-out. A refusal is returned, not raised."""
        return self._reply(time.monotonic() + self._timeout)

    def skip(self, count: int) -> bool:
        """Drop so many replies, if they are small and come at once. If not, the connection must be closed."""
        self._max_bulk_bytes = _RECEIVE_BYTES
        try:
            for _ in range(count):
                self._reply(time.monotonic() + _SKIP_SECONDS)
        except OSError:
            return False
        finally:
            self._max_bulk_bytes = _MAX_BULK_BYTES
        return True

    def is_idle(self) -> bool:
        """Whether it is open, with nothing unread."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not self._ahead and not poll.poll(0)

    def close(self) -> None:
        self._socket.close()

    def _demand(self, command: Command) -> None:
        self.send([command])
        reply = self.receive()
        if isinstance(reply, Refused):
            raise reply

    def _reply(self, deadline: float) -> Reply:
        line = self._line(deadline)
        kind, rest = line[:1], line[1:]
        try:
            if kind == b"+":
                return rest
            if kind == b"-":
                return Refused(rest.decode("utf-8", "replace"))
            if kind == b":":
                return int(rest)
            if kind == b"$":
                return self._bulk(int(rest), deadline)
            if kind == b"*":
                return None if int(rest) < 0 else [self._reply(deadline) for _ in range(int(rest))]
        except ValueError:
            pass
        raise ProtocolError(f"a reply expected, got {line[:40]!r}")

    def _line(self, deadline: float) -> bytes:
        while (end := self._ahead.find(b"\r\n")) < 0:
            self._wait(deadline)
            data = self._socket.recv(_RECEIVE_BYTES)
            if not data:
                raise ConnectionResetError("closed by the server")
            self._ahead += data
        line = bytes(self._ahead[:end])
        del self._ahead[: end + 2]
        return line

    def _bulk(self, length: int, deadline: float) -> memoryview | None:
        if length < 0:
            return None
        if length > self._max_bulk_bytes:
            raise ProtocolError(f"at most {self._max_bulk_bytes} bytes expected, got a reply of {length}")
        buffer = memoryview(bytearray(length + 2))
        known = min(len(self._ahead), len(buffer))
        buffer[:known] = self._ahead[:known]
        del self._ahead[:known]
        while known < len(buffer):
            self._wait(deadline)
            count = self._socket.recv_into(buffer[known:])
            if not count:
                raise ConnectionResetError("closed by the server")
            known += count
        return buffer[:length].toreadonly()

    def _wait(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
