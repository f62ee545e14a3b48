"""API keys: who may ask, and whose KV is whose.

A key opens every route but the open ones. It also makes a salt, so that KV computed for one key is never reused for
another, in the engine, in the store or across restarts; a request's own `cache_salt` divides a key's KV further. Nobody
can guess a salt without the key, and nobody can find the key from it but by trying keys: long random ones are out of
reach (`openssl rand -hex 32`).

Only digests of keys are kept, under a secret of this process: how long a comparison takes tells nothing about a key.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from rekindle.errors import InvalidRequest, RekindleError
from rekindle.settings import Settings

_CALLER = "rekindle.caller"
_SALT_BYTES = 16
_KEY_PROTOCOLS = ("rekindle.key.", "openai-insecure-api-key.")  # browsers can't give a socket other headers


class Unauthorized(RekindleError):
    """The request brings no API key, or a wrong one."""

    status = 401
    code = "invalid_api_key"


@dataclass(frozen=True)
class Caller:
    """Whoever holds an API key."""

    name: str = ""  # for logs: what the key file calls the key, or key-1, key-2 …; "" where no keys are set
    _salt: bytes = field(default=b"", repr=False)  # of one length for all keys

    def salt(self, cache_salt: str | None = None) -> bytes:
        """The salt of a request: no two pairs of key and `cache_salt` have the same."""
        return self._salt + (cache_salt or "").encode("utf-8")


ANYBODY = Caller()


def owner_of(salt: bytes) -> bytes:
    """Of a salt, that of the key it was made for: `Caller.salt` without a `cache_salt`."""
    return salt[:_SALT_BYTES]


def caller_of(request: HTTPConnection) -> Caller:
    """Who sent this request, once it has passed the door."""
    caller = request.scope[_CALLER]
    assert isinstance(caller, Caller)
    return caller


def name_of(scope: Mapping[str, object]) -> str:
    """The name of the key that a request brought, for logs; "" if it has none or has not passed the door."""
    caller = scope.get(_CALLER)
    return caller.name if isinstance(caller, Caller) else ""


class Keys:
    """The keys of a server. Without any, everybody may ask."""

    def __init__(self, named: Sequence[tuple[str, str]] = ()) -> None:
        """Of (name, key); a name may be empty. Raises InvalidRequest for a key that no header can carry."""
        self._secret = os.urandom(32)
        self._callers: dict[bytes, Caller] = {}
        for number, (name, key) in enumerate(named, 1):
            label = name or f"key-{number}"
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise InvalidRequest(f"API key {label!r}: expected printable ASCII without spaces", param="api_key")
            salt = blake2b(key.encode(), digest_size=_SALT_BYTES, person=b"rekindle salt").digest()
            self._callers.setdefault(self._digest(key.encode()), Caller(label, salt))

    @classmethod
    def load(cls, settings: Settings) -> Self:
        """The keys that the settings name. Raises InvalidRequest."""
        named = [("", key.get_secret_value()) for key in settings.api_key]
        if settings.api_key_file is not None:
            named += _read(Path(settings.api_key_file).expanduser())
        if settings.max_per_key is not None and not named:
            raise InvalidRequest("setting max_per_key: expected API keys (api_key, api_key_file), got none")
        return cls(named)

    def __bool__(self) -> bool:
        return bool(self._callers)

    def check(self, headers: Headers) -> Caller:
        """Whose key the headers hold (`Authorization: Bearer`, `x-api-key`, a protocol). Raises Unauthorized."""
        if not self._callers:
            return ANYBODY
        given = _given(headers)
        if given is None:
            raise Unauthorized("expected an API key in the header 'Authorization: Bearer KEY', got none")
        digest = self._digest(given.encode("latin-1"))
        found = [caller for known, caller in self._callers.items() if hmac.compare_digest(known, digest)]
        if not found:
            raise Unauthorized("the API key is not one of this server's")
        return found[0]

    def _digest(self, key: bytes) -> bytes:
        return blake2b(key, key=self._secret, digest_size=32).digest()


def note(scope: MutableMapping[str, Any], caller: Caller) -> None:
    """Write down who sent a request, for `caller_of`."""
    scope[_CALLER] = caller


def _given(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    if key := headers.get("x-api-key", "").strip():
        return key
    offered = (each.strip() for each in headers.get("sec-websocket-protocol", "").split(","))
    keys = (each.removeprefix(prefix) for each in offered for prefix in _KEY_PROTOCOLS if each.startswith(prefix))
    return next(keys, None) or None


def _read(file: Path) -> list[tuple[str, str]]:
    """Of a key file, (name, key) for each line that is not empty and no comment."""
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise InvalidRequest(f"cannot read the key file {file}: {error.strerror}", param="api_key_file") from None
    except ValueError:
        raise InvalidRequest(f"the key file {file} is not text in UTF-8", param="api_key_file") from None
    named = list(_named(lines))
    if not named:  # an open server is not what somebody who names a key file wants
        raise InvalidRequest(f"the key file {file} holds no key", param="api_key_file")
    return named


def _named(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        text = line.strip()
        if text and not text.startswith("#"):
            name, colon, key = text.partition(":")
            yield (name.strip(), key.strip()) if colon else ("", text)
