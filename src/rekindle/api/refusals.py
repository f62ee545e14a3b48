"""Every refusal, in one shape, on every route:

    {"error": {"message": "…", "type": "invalid_request_error", "param": "temperature" or null, "code": "…" or null}}

This is OpenAI's shape. Statuses differ in one point: a field of a wrong type is 400 under /v1, as with OpenAI, and 422
elsewhere, as usual with FastAPI. What went wrong inside the server goes to its log; a client gets neither traces nor
paths nor anybody's text.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.websockets import WebSocket

from rekindle.api.load import retry_after
from rekindle.api.requests import id_header
from rekindle.errors import InvalidRequest, Overloaded, RekindleError

log = logging.getLogger(__name__)

_WORD = re.compile(r"[\w.-]{1,24}")  # a choice that is misspelt, and nobody's text
_SHOWN = 200  # characters of a path
_INTERNAL = "the server failed to answer; its log says why"
UNKNOWN_FIELD = "unknown_field"  # a kind of mistake in a body …
NAME = "name"  # … and what has the field's name in its context
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
_JSON_TYPES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    type(None): "null",
}
_EXPECTED = {  # pydantic's kinds of wrong types, in JSON's words
    "bool_parsing": "true or false",
    "bool_type": "a boolean",
    "dict_type": "an object",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "list_type": "an array",
    "literal_error": "{expected}",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least one character",
    "string_type": "a string",
    "too_long": "at most {max_length} elements",
    "too_short": "at least one element",
    "union_tag_invalid": "{expected_tags} as {discriminator}",
    "union_tag_not_found": "the field {discriminator}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
}


class InvalidInput(InvalidRequest):
    """What came is not what was expected; its code says in which way, the same over HTTP and on sockets."""

    def __init__(self, message: str, *, param: str | None = None, code: str) -> None:
        super().__init__(message, param=param)
        self.code = code


class Json(Response):
    """A JSON response, which no text can break: what UTF-8 cannot say becomes a question mark."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8", "replace")


def refusal(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of a refusal."""
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def respond(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Json:
    """A refusal as a response."""
    return Json(refusal(status, message, param=param, code=code), status_code=status, headers=headers)


def refusal_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for an error; what the client need not know is logged instead."""
    if not isinstance(error, RekindleError) or error.status == 500:
        log.error("a request failed: %s", error, exc_info=error)
        code = error.code if isinstance(error, RekindleError) else RekindleError.code
        return 500, refusal(500, _INTERNAL, code=code)
    param = error.param if isinstance(error, InvalidRequest) else None
    return error.status, refusal(error.status, str(error), param=param, code=error.code)


def install(app: FastAPI) -> None:
    """Let the app write all its refusals this way."""
    app.add_exception_handler(RekindleError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(ClientDisconnect, _on_leaving)
    app.add_exception_handler(Exception, _on_failure)


def refuse(error: Exception, headers: Mapping[str, str] | None = None) -> Json:
    """The refusal that an error is, as a response with the headers that belong to its status, and others."""
    status, body = refusal_of(error)
    own: dict[str, str] = {}
    if status == 401:
        own["WWW-Authenticate"] = "Bearer"
    elif status in (429, 503):
        own |= retry_after(error.retry_seconds if isinstance(error, Overloaded) else None)
    return Json(body, status_code=status, headers=own | dict(headers or {}))


async def _on_error(request: Request, error: Exception) -> Response:
    return refuse(error)


async def _on_leaving(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_failure(request: Request, error: Exception) -> Response:
    # Starlette raises the error again, so that the server logs it and closes the connection: the client should know
    return respond(500, _INTERNAL, code=RekindleError.code, headers=id_header(request.scope) | {"Connection": "close"})


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message, path = error.detail, request.url.path[:_SHOWN]
    if error.status_code == 404:
        as_socket = dict(request.scope) | {"type": "websocket"}
        routes = request.app.routes[:-1]  # the last is `no_such_socket`
        is_socket = any(route.matches(as_socket)[0] is Match.FULL for route in routes)
        nowhere = f"there is no {request.method} {path} here"
        message = f"{path} is a WebSocket: open it as one" if is_socket else nowhere + _meant(request, routes)
    elif error.status_code == 405:
        message = f"{path} cannot be asked with {request.method}"
    elif error.status_code == 400:
        message = "the body cannot be read as JSON"
    code = _HTTP_CODES.get(error.status_code, "invalid_request")
    return respond(error.status_code, message, code=code, headers=error.headers)


def _meant(request: Request, routes: Sequence[BaseRoute]) -> str:
    """What may have been meant, as a hint: clients put one /v1 too many before a path, or too few, or a / behind it."""
    path = request.url.path[:_SHOWN].rstrip("/")
    for other in (path, f"/v1{path}", "/" + path.removeprefix("/").partition("/")[2]):
        asked = dict(request.scope) | {"path": other, "raw_path": other.encode()}
        if other not in ("/", request.url.path) and any(route.matches(asked)[0] is Match.FULL for route in routes):
            return f"; did you mean {other}?"
    return ""


async def no_such_socket(socket: WebSocket) -> None:
    """For sockets at an address where none is."""
    message = f"there is no WebSocket {socket.url.path[:200]} here"
    await socket.send_denial_response(respond(404, message, code="not_found"))


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    location = first["loc"][1:]  # the first is "body", "path" or "query"
    if first["type"] == "json_invalid":
        reason = first["ctx"]["error"]
        return respond(400, f"the body is not JSON: {reason} at character {location[0]}", code="invalid_json")
    if not location and isinstance(first["input"], bytes):
        given = request.headers.get("content-type", "none")
        return respond(415, f"expected the content type application/json, got {given}", code="wrong_content_type")
    status = 400 if request.url.path.startswith("/v1/") or first["type"] == UNKNOWN_FIELD else 422
    if not location and first["type"] != UNKNOWN_FIELD:
        given = "nothing" if first["type"] == "missing" else _json_type(first["input"])
        return respond(status, f"expected a JSON object as body, got {given}", code="invalid_type")
    wrong = _invalid(first, location)
    return respond(status, str(wrong), param=wrong.param, code=wrong.code)


def invalid_message(error: ValidationError, *, skip: int = 0) -> InvalidInput:
    """What is wrong with a socket's message; the first `skip` parts of the place name no field."""
    first = error.errors(include_url=False)[0]
    return _invalid(first, first["loc"][skip:])


def _invalid(error: Mapping[str, Any], location: Sequence[str | int]) -> InvalidInput:
    """What is wrong with a field, on whatever way it came."""
    kind = error["type"]
    param = _dotted([*location, error["ctx"][NAME]] if kind == UNKNOWN_FIELD else location)
    return InvalidInput(f"{param}: {_reason(error)}", param=param, code=_code(kind))


def _reason(error: Mapping[str, Any]) -> str:
    """What was expected and what came."""
    if error["type"] == "missing":
        return "this field is required"
    if expected := _EXPECTED.get(error["type"]):
        limits = {
            name: f"{value:g}" if isinstance(value, float) else value for name, value in error.get("ctx", {}).items()
        }
        return f"expected {expected.format_map(limits)}, got {_got(error)}"
    return str(error["msg"]).replace("Input should be", "expected")


def _got(error: Mapping[str, Any]) -> str:
    """What came: a short word where one of a few was expected, and what a URL says; of all else that is long, how long."""
    kind, value = error["type"], error["input"]
    if kind in ("string_too_long", "too_long"):
        return f"{len(value):,}"
    if kind == "union_tag_not_found":
        return "none"
    word = error["ctx"]["tag"] if kind == "union_tag_invalid" else value
    is_choice = kind in ("literal_error", "union_tag_invalid") or error["loc"][:1] == ("query",)
    return repr(word) if is_choice and isinstance(word, str) and _WORD.fullmatch(word) else _json_type(value)


def _code(kind: str) -> str:
    if kind == "missing":
        return "missing_field"
    if kind == UNKNOWN_FIELD:
        return UNKNOWN_FIELD
    return "invalid_type" if kind.endswith("_type") or kind == "int_from_float" else "invalid_value"


def _json_type(value: object) -> str:
    """The type instead of the value, which may be anybody's text; numbers as they are."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value) if abs(value) < 1 << 63 else "a number that is too large"
    if value in ("", []):
        return "an empty string" if value == "" else "an empty array"
    return _JSON_TYPES.get(type(value), "a value of another type")


def _dotted(location: Sequence[str | int]) -> str:
    """("messages", 0, "role") as "messages[0].role"."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")
