"""A small HTTP client for a running Rekindle server: JSON in, JSON or server-sent events out.

It speaks plain `http.client`, so the command needs no HTTP library, and no proxy set in the environment comes between a
terminal and its own machine.
"""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import SplitResult, urlsplit

from rekindle.errors import InvalidRequest, RekindleError
from rekindle.settings import Settings

CONNECT_SECONDS = 10.0
_MISUSED = (400, 413, 422)  # the server blames the request
_API = re.compile(r"(/v1|/ws|/ws/input|/ws/output)?/*$")


class ServerError(RekindleError):
    """The server can't be reached, or it refused."""

    def __init__(self, message: str, answered: int | None = None) -> None:
        super().__init__(message)
        self.answered = answered  # the status with which it refused


class Client:
    """One server, by its base URL."""

    def __init__(self, url: str, *, key: str | None = None) -> None:
        """`key` is sent with every request. Raises InvalidRequest if this is no http(s) URL."""
        parts = server_url(url, ("http", "https"))
        self._host, self._port, self._base = parts.hostname or "", parts.port, parts.path
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self.url = parts.geturl()
        self._make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection

    def get(self, path: str) -> dict[str, Any]:
        """The JSON at a path. Raises ServerError."""
        with self._response("GET", path, None) as response:
            return _json(response.read(), self.url)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON answer to a JSON body. Raises ServerError; InvalidRequest if the server blames the request."""
        with self._response("POST", path, body) as response:
            return _json(response.read(), self.url)

    def delete(self, path: str) -> dict[str, Any]:
        """The JSON answer to deleting what is at a path. Raises ServerError."""
        with self._response("DELETE", path, None) as response:
            return _json(response.read(), self.url)

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a stream as they come, up to `[DONE]`. Closing the iterator hangs up."""
        with self._response("POST", path, body) as response:
            for line in response:
                data = line.decode("utf-8").rstrip("\r\n")
                if not data.startswith("data:"):
                    continue
                data = data.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                event = _json(data.encode(), self.url)
                if "error" in event:
                    raise ServerError(_reason(event))
                yield event
        raise ServerError(f"{self.url} broke the answer off")

    @contextmanager
    def _response(self, method: str, path: str, body: Mapping[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        connection = self._make(self._host, self._port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(None)  # an answer may take its time
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self._base + path, data, self._headers)
            response = connection.getresponse()
            if response.status >= 400:
                raise refusal(self.url, response.status, response.read(), response.reason)
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"cannot talk to {self.url}: {error or type(error).__name__}") from None
        finally:
            connection.close()


def server_url(url: str, schemes: Collection[str]) -> SplitResult:
    """Where a server is: http if no scheme is given, and under the URL's path but for the part that names one of its APIs.

    Raises InvalidRequest if this is no URL of one of the schemes.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        is_known = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a bracket that is not closed, a port that is no number
        is_known = False
    if not is_known or parts.query or parts.fragment or parts.username is not None:
        raise InvalidRequest(f"expected a URL such as http://127.0.0.1:8000, got {url!r}", param="url")
    return parts._replace(path=_API.sub("", parts.path))


def refusal(url: str, status: int, body: bytes, phrase: str) -> RekindleError:
    """What a server's refusal means; `phrase` is its reason if the body gives none."""
    try:
        reason = _reason(json.loads(body))
    except ValueError:
        reason = phrase or "it gave no reason"
    if status == 401:
        reason += "; give the server's key with --api-key or in REKINDLE_API_KEY"
    message = f"{url} refused ({status}): {reason}"
    return InvalidRequest(message) if status in _MISUSED else ServerError(message, status)


def first_key(settings: Settings) -> str | None:
    """The API key to call a server with: the first that the settings name, as `REKINDLE_API_KEY` does."""
    return settings.api_key[0].get_secret_value() if settings.api_key else None


def _json(data: bytes, url: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ServerError(f"{url} answered with something else than a JSON object; is it a Rekindle server?")
    return value


def _reason(event: Any) -> str:
    error = event.get("error", event) if isinstance(event, dict) else event
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
