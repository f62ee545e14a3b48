"""Which web pages may call, and by which names this server is called.

Browsers keep a page of another origin from reading an answer, but not from asking: a POST without a body needs nobody's
leave, and neither does a socket. So a page that nobody named could empty the store. Browsers do say which page asks, in the
header `Origin`, with everything but plain reading; programs that are no browsers send none.

A page may also come from a name that its owner lets point to this machine (DNS rebinding): then it is of the server's own
origin, and may read as well. So a server that only this machine can reach, and that asks for no key, goes by no name but
those of this machine and those that were allowed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from rekindle.errors import RekindleError


class Forbidden(RekindleError):
    """A page of another origin asks."""

    status = 403
    code = "forbidden_origin"


class UnknownHost(RekindleError):
    """The server is called by a name that is not its own."""

    status = 403
    code = "unknown_host"


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(headers: Headers, allowed: Collection[str]) -> None:
    """Let in who calls this server by an address, as localhost, or by an allowed name. Raises UnknownHost."""
    name = _place(f"//{headers.get('host', '')}", with_port=False)
    if name is None or "*" in allowed or name in allowed or name == "localhost" or name.endswith(".localhost"):
        return
    try:
        ipaddress.ip_address(name)
    except ValueError:
        raise UnknownHost(f"this server is not called {name[:100]}; see the setting allowed_host") from None


def check_origin(headers: Headers, allowed: Collection[str]) -> None:
    """Let in who is no page, a page of this server's own origin, and pages that may call. Raises Forbidden."""
    origin = headers.get("origin")
    if origin is None or "*" in allowed or origin in allowed:
        return
    if _place(origin) != headers.get("host", "").lower():
        raise Forbidden(f"pages of {origin[:100]} may not call this server; see the setting cors_origin")


def _place(url: str, *, with_port: bool = True) -> str | None:
    """The host of a URL, in small letters, with the port as the header `Host` has it."""
    try:
        parts = urlsplit(url)
        return (parts.netloc.lower() if with_port else parts.hostname) or None
    except ValueError:
        return None
