"""A small HTTP client for a running Rekindle server: JSON in, JSON or server-sent events out.

It speaks plain `http.client`, so the command needs no HTTP library, and no proxy set in the environment comes between a
terminal and its own machine.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from rekindle.errors import InvalidRequest, RekindleError
from rekindle.settings import Settings

CONNECT_SECONDS = 10.0


class ServerError(RekindleError):
    """The server can't be reached, or it refused."""

    def __init__(self, message: str, answered: int | None = None) -> None:
        super().__init__(message)
        self.answered = answered  # the status with which it refused


class Client:
    """One server, by its base URL."""

    def __init__(self, url: str, *, key: str | None = None) -> None:
        """`key` is sent with every request. Raises InvalidRequest if this is no http(s) URL."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:  # a bracket that is not closed, a port that is no number
            self._host = ""
        if not self._host or parts.scheme not in ("http", "https"):
            raise InvalidRequest(f"expected a URL such as http://127.0.0.1:8000, got {url!r}", param="url")
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self.url = f"{parts.scheme}://{parts.netloc}"
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
            connection.request(method, path, data, self._headers)
            response = connection.getresponse()
            if response.status >= 400:
                raise _refusal(response, self.url)
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"cannot talk to {self.url}: {error or type(error).__name__}") from None
        finally:
            connection.close()


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


def _refusal(response: http.client.HTTPResponse, url: str) -> RekindleError:
    try:
        reason = _reason(json.loads(response.read()))
    except ValueError:
        reason = response.reason
    message = f"{url} refused ({response.status}): {reason}"
    return InvalidRequest(message) if response.status in (400, 413, 422) else ServerError(message, response.status)


def _reason(event: Any) -> str:
    error = event.get("error", event) if isinstance(event, dict) else event
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
