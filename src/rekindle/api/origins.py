"""Which web pages may call.

Browsers keep a page of another origin from reading an answer, but not from asking: a POST without a body needs nobody's
leave, and neither does a socket. So a page that nobody named could empty the store. Browsers do say which page asks, in the
header `Origin`, with everything but plain reading; programs that are no browsers send none.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from rekindle.errors import RekindleError


class Forbidden(RekindleError):
    """A page of another origin asks."""

    status = 403
    code = "forbidden_origin"


def check_origin(headers: Headers, allowed: Collection[str]) -> None:
    """Let in who is no page, a page of this server's own origin, and pages that may call. Raises Forbidden."""
    origin = headers.get("origin")
    if origin is None or "*" in allowed or origin in allowed:
        return
    if _place(origin) != headers.get("host", "").lower():
        raise Forbidden(f"pages of {origin[:100]} may not call this server; see the setting cors_origin")


def _place(origin: str) -> str | None:
    """Host and port, as the header `Host` has them."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
