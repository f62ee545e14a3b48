"""A Redis or Valkey server by its URL, behind a circuit breaker.

Connections, protocol and TLS are redis-py's, with its parser in C. Its own retries are off: the breaker decides when to ask
again. An idle connection that the server has closed meanwhile is replaced before it is used, so a restart that nobody
noticed is no fault. What goes wrong is told as TierUnavailable, in words and without the password.

The time-out is one for connecting, one for sending, and one for each wait for more of an answer. So a server that is silent
is given up after it; one that sends a byte now and then is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.retry import Retry

from rekindle.errors import InvalidRequest, TierUnavailable
from rekindle.kv.breaker import Breaker

_SCHEMES = {"redis": "redis", "valkey": "redis", "rediss": "rediss", "valkeys": "rediss"}  # as the library names them
_DEFAULT_PORT = 6379


class Unreachable(TierUnavailable):
    """No answer, or no way in."""


class Link:
    """Thread-safe. What asks raises TierUnavailable, at once while the breaker is open."""

    def __init__(self, url: str, password: str | None, timeout_seconds: float, clock: Callable[[], float]) -> None:
        """The URL's own password goes before the given one. Raises InvalidRequest."""
        library_url, self.server = parse_url(url)
        self.breaker = Breaker(clock, fault=Unreachable)
        self._timeout = timeout_seconds
        self._client = redis.Redis.from_url(
            library_url,
            password=password,
            protocol=2,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(NoBackoff(), 0),
        )

    def batch(self) -> Pipeline:
        """Commands to be sent together, by `send`."""
        return self._client.pipeline(transaction=False)

    def send(self, batch: Pipeline, *, may_refuse: bool = False) -> list[Any]:
        """The replies. A refusal is a fault, or with `may_refuse` a ResponseError among the replies."""
        if not len(batch):
            return []  # which says nothing about the server
        with self.breaker.attempt(), self._told():
            replies = batch.execute(raise_on_error=False)
            refusal = next((reply for reply in replies if isinstance(reply, redis.ResponseError)), None)
            if refusal is not None and not may_refuse:
                raise refusal
            return replies

    def ask(self, *command: str | bytes | int) -> Any:
        """The reply to one command."""
        batch = self.batch()
        batch.execute_command(*command)  # type: ignore[no-untyped-call]
        (reply,) = self.send(batch)
        return reply

    def close(self) -> None:
        self._client.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except redis.TimeoutError:
            raise Unreachable(f"the store's server {self.server} gave no answer within {self._timeout:g} s") from None
        except redis.InvalidResponse as error:
            raise Unreachable(f"{self.server} is no server for a store: {error}") from None
        except redis.ResponseError as error:
            raise Unreachable(f"the store's server {self.server} refuses: {error}") from None
        except (redis.RedisError, OSError, UnicodeError) as error:  # the last for a name that can't be one of a host
            raise Unreachable(f"the store's server {self.server} can't be reached: {error}") from None


def parse_url(url: str) -> tuple[str, str]:
    """A URL redis://[[user]:password@]host[:port][/db], or valkey, rediss, valkeys, as the library takes it; and its
    server in words, without the password. Raises InvalidRequest.
    """
    expected = "a store's URL like redis://host:port/db (or valkey, rediss, valkeys) expected"
    try:
        parts = urlsplit(url)
        port, path = parts.port or _DEFAULT_PORT, parts.path.strip("/")
        database = int(path) if path else 0
    except ValueError:
        raise InvalidRequest(f"{expected}, got one whose host, port or db is not valid", param="store_url") from None
    if parts.scheme not in _SCHEMES:
        raise InvalidRequest(f"{expected}, got one with the scheme {parts.scheme!r}", param="store_url")
    if not parts.hostname:
        raise InvalidRequest(f"{expected}, got one without a host", param="store_url")
    if database < 0 or parts.query or parts.fragment:
        raise InvalidRequest(f"{expected}, got one with a db below 0 or with more behind it", param="store_url")
    scheme = _SCHEMES[parts.scheme]
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return parts._replace(scheme=scheme).geturl(), f"{scheme}://{host}:{port}/{database}"
