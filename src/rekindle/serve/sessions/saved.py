"""Sessions in files: what was said, as text and tokens, so that a session outlives the process.

The KV is in the store, under keys that follow from the tokens; a file only says which. It is written whole to a temporary
name and renamed, for its owner's eyes only, and named by a digest of the session's key, which is what a client holds.
"""

from __future__ import annotations

import json
import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rekindle.errors import SessionError

VERSION = 1


class SavedSessions:
    """A folder of sessions, or nothing where there is no folder."""

    def __init__(self, folder: Path | None, fingerprint: bytes) -> None:
        self._folder = folder
        self._fingerprint = fingerprint.hex()

    @property
    def is_kept(self) -> bool:
        """Whether anything outlives the process."""
        return self._folder is not None

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{blake2b(key.encode(), digest_size=16, person=b'rekindle live').hexdigest()}.json"

    def write(self, key: str, content: dict[str, Any]) -> None:
        """In place of what was written before. Raises OSError."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(key)
        temporary = path.with_suffix(".tmp")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"version": VERSION, "fingerprint": self._fingerprint} | content, file)
        temporary.replace(path)

    def read(self, key: str) -> dict[str, Any]:
        """What was written for this key. Raises SessionError if there is nothing, or nothing that fits."""
        try:
            content = json.loads(self._path(key).read_text("utf-8")) if self._folder is not None else None
        except FileNotFoundError:
            content = None
        except (OSError, ValueError) as error:
            raise SessionError(f"the saved session can't be read ({type(error).__name__}); begin a new one") from None
        if not isinstance(content, dict):
            raise SessionError("there is no session of this handle; it may have been on another server")
        if (content.get("version"), content.get("fingerprint")) != (VERSION, self._fingerprint):
            raise SessionError("the session was had with another model or other settings; begin a new one")
        return content

    def delete(self, key: str) -> None:
        """Forget it, if it is there."""
        if self._folder is not None:
            self._path(key).unlink(missing_ok=True)
