"""One server, as a client of OpenAI's chat completions sees it.

Nothing that a server does may stop a load test: a refusal, an error in the stream, a stream that breaks off and one that
falls silent each become an `Answer` with the reason. Only `connect` raises, because a server that can't be used at all is
worth a message and not a report full of errors.

What goes beyond OpenAI's format is tried first and left out where it is refused: `ignore_eos`, which makes answers as long
as asked, and `stream_options`, which asks for the usage.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import httpx

from rekindle.errors import InvalidRequest, RekindleError
from rekindle.lab.load.texts import TOKENS_PER_WORD, words

Message = dict[str, str]
Heard = Callable[[float], None]  # a piece of text came, at this time

CONNECT_SECONDS = 10.0
_MODELS_SECONDS = 60.0  # that a busy server may take to name its models
_EXTRAS: tuple[dict[str, Any], ...] = (
    {"stream_options": {"include_usage": True}, "ignore_eos": True},
    {"stream_options": {"include_usage": True}},
    {},
)
_CALIBRATION_WORDS = (64, 256)


class ServerError(RekindleError):
    """A server can't be reached, can't be used, or did not start."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a request came to. Times are `time.perf_counter()`'s."""

    due: float  # when it should have been sent
    ended: float
    arrivals: tuple[float, ...] = ()  # of the pieces of text; of the first event, if no piece held text
    text: str = ""
    asked_tokens: int  # length of the answer that was asked for
    prompt_tokens: int | None = None  # as the server counts
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    error: str | None = None  # why it is not whole

    @property
    def ttft(self) -> float | None:
        """Seconds until the first piece of text."""
        return self.arrivals[0] - self.due if self.arrivals else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces of text."""
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def computed_tokens(self) -> int | None:
        """Prompt tokens that came out of no cache."""
        return None if self.prompt_tokens is None else self.prompt_tokens - (self.cached_tokens or 0)

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer, or pieces of text where the server does not count."""
        return len(self.arrivals) if self.completion_tokens is None else self.completion_tokens


@dataclass
class _Stream:
    """What has been read of an answer."""

    heard: Heard | None
    arrivals: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    first_event: float | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    cache_n: int | None = None  # llama-server's own word for cached tokens
    finished: bool = False
    error: str | None = None

    def take(self, data: str) -> None:
        """One event."""
        now = time.perf_counter()
        if data == "[DONE]":
            self.finished = True
            return
        event = _object(data)
        if event is None:
            self.error = f"an event is not a JSON object: {data[:60]!r}"
        elif "error" in event:
            self.error = f"error in the stream: {reason_of(event)}"
        else:
            try:
                self._take_event(event, now)
            except (AttributeError, TypeError):
                self.error = f"an event is not a chat completion's: {data[:60]!r}"

    def _take_event(self, event: dict[str, Any], now: float) -> None:
        usage = event.get("usage")
        self.usage = usage if isinstance(usage, dict) else self.usage
        timings = event.get("timings")
        if isinstance(timings, dict) and isinstance(timings.get("cache_n"), int):
            self.cache_n = timings["cache_n"]
        for choice in event.get("choices") or ():
            self.first_event = self.first_event or now
            delta = choice.get("delta") or {}
            text = delta.get("content") or delta.get("reasoning_content") or ""
            if text:
                self.pieces.append(text)
                self.arrivals.append(now)
                if self.heard is not None:
                    self.heard(now)
            self.finished = self.finished or choice.get("finish_reason") is not None

    def answer(self, due: float, asked_tokens: int, error: str | None) -> Answer:
        if error is None and not self.finished:
            error = "the answer broke off"
        if not self.arrivals and error is None and self.first_event is not None:
            self.arrivals.append(self.first_event)  # an answer of tokens without text
        cached = _count_of(self.usage.get("prompt_tokens_details"), "cached_tokens")
        return Answer(
            due=due,
            ended=time.perf_counter(),
            arrivals=tuple(self.arrivals),
            text="".join(self.pieces),
            asked_tokens=asked_tokens,
            prompt_tokens=_count_of(self.usage, "prompt_tokens"),
            completion_tokens=_count_of(self.usage, "completion_tokens"),
            cached_tokens=self.cache_n if cached is None else cached,
            error=error,
        )


class Target:
    """A server to be loaded. An async context manager."""

    def __init__(
        self, url: str, *, api_key: str | None = None, model: str | None = None, timeout_seconds: float = 600.0
    ) -> None:
        """`timeout_seconds` is what one request may take in all. Raises InvalidRequest if this is no http(s) URL."""
        self.url = _base(url)
        self.name = httpx.URL(self.url).netloc.decode()
        self._model = model
        self._timeout_seconds = timeout_seconds
        self._extras = _EXTRAS[0]
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS),
            # a connection for each request: llama-server closes kept ones when it likes, which a request may meet
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=not _is_local(httpx.URL(self.url).host),  # no proxy between a machine and itself
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    @property
    def fixes_length(self) -> bool:
        """Whether the server takes `ignore_eos`."""
        return "ignore_eos" in self._extras

    async def connect(self) -> None:
        """Find the model and what the server can do, with a first short request. Raises ServerError."""
        if self._model is None:
            self._model = await self._served_model()
        refusal = ""
        for extras in _EXTRAS:
            self._extras = extras
            answer = await self.ask([{"role": "user", "content": "Hello."}], 2)
            if answer.error is None:
                return
            refusal = refusal or answer.error
            if not answer.error.startswith(("HTTP 400", "HTTP 422")):
                break
        raise ServerError(f"{self.url} can't be loaded: a first chat completion failed: {refusal}")

    async def tokens_per_word(self) -> float:
        """Of this server's tokenizer, by its `/tokenize` if there is one, by the usage of two requests otherwise."""
        few, many = _CALIBRATION_WORDS
        fewer = await self._count(words("calibration", few))
        more = await self._count(words("calibration", many))
        if fewer is not None and more is not None and more > fewer:
            return (more - fewer) / (many - few)
        return TOKENS_PER_WORD

    async def ask(
        self, messages: list[Message], max_tokens: int, *, due: float | None = None, heard: Heard | None = None
    ) -> Answer:
        """Stream one answer; greedy. Never raises but for being cancelled, which hangs up."""
        stream = _Stream(heard)
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            **self._extras,
        }
        request = self._http.build_request("POST", "/v1/chat/completions", json=body)
        due = time.perf_counter() if due is None else due  # clock on
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._read(request, stream)
        except (TimeoutError, httpx.TimeoutException):
            return stream.answer(due, max_tokens, f"no end after {self._timeout_seconds:g} s")
        except httpx.HTTPError as error:
            begun = "the answer broke off" if stream.first_event else "no connection"
            return stream.answer(due, max_tokens, f"{begun}: {str(error) or type(error).__name__}")
        return stream.answer(due, max_tokens, stream.error)

    async def _read(self, request: httpx.Request, stream: _Stream) -> None:
        response = await self._http.send(request, stream=True)
        async with aclosing(response):
            if response.status_code >= 400:
                await response.aread()
                stream.error = f"HTTP {response.status_code}: {reason_of(_object(response.text) or {})}"
                return
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                stream.error = f"expected text/event-stream, got {kind or 'no content type'}"
                return
            async for data in _events(response):
                stream.take(data)  # clock off, for the first piece of text, and for each
                if stream.error is not None:
                    return

    async def _served_model(self) -> str | None:
        try:
            timeout = httpx.Timeout(_MODELS_SECONDS, connect=CONNECT_SECONDS)
            response = await self._http.get("/v1/models", timeout=timeout)
        except httpx.HTTPError as error:
            raise ServerError(f"cannot reach {self.url}: {error or type(error).__name__}; is it running?") from None
        if response.status_code in (401, 403):
            wants = "takes another API key" if "authorization" in self._http.headers else "wants an API key"
            raise ServerError(f"{self.url} {wants} (HTTP {response.status_code}); give it with --api-key")
        models = (_object(response.text) or {}).get("data")
        if not (isinstance(models, list) and models and isinstance(models[0], dict) and "id" in models[0]):
            raise ServerError(
                f"{self.url}/v1/models gave no list of models (HTTP {response.status_code}): is this an "
                "OpenAI-compatible server? If it is, name its model with --api-model"
            )
        owner = str(models[0].get("owned_by", ""))
        self.name = {"llamacpp": "llama-server"}.get(owner, owner) or self.name
        return str(models[0]["id"])

    async def _count(self, text: str) -> int | None:
        """Tokens of a text, or of a prompt that holds it."""
        try:
            response = await self._http.post("/tokenize", json={"content": text, "prompt": text, "model": self._model})
            tokens = (_object(response.text) or {}).get("tokens") if response.is_success else None
        except httpx.HTTPError:
            tokens = None
        if isinstance(tokens, list):
            return len(tokens)
        return (await self.ask([{"role": "user", "content": text}], 1)).prompt_tokens


def _count_of(record: Any, name: str) -> int | None:
    value = record.get(name) if isinstance(record, dict) else None
    return value if isinstance(value, int) else None


def reason_of(body: dict[str, Any]) -> str:
    """What an error body says, on one line."""
    error = body.get("error", body)
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:160] or "no reason given"


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of server-sent events, one line each. Lines end with a newline: httpx would also split at U+2028."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode("utf-8", "replace")


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _base(url: str) -> str:
    """The URL without a `/v1` at its end."""
    try:
        parsed = httpx.URL(url if "://" in url else f"http://{url}")
    except (httpx.InvalidURL, ValueError):
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidRequest(f"expected a URL such as http://127.0.0.1:8000, got {url!r}", param="url")
    return str(parsed).rstrip("/").removesuffix("/v1").rstrip("/")


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
