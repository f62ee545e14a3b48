"""Sessions in files: what was said, as text and tokens, so that a session outlives the process.

    <folder>/<owner>/<session>.json

Both names are digests, of the owner's salt and of the session's key, which is what a client holds: who has another salt
finds nothing. The KV is in the store, under keys that follow from the tokens; a file only says which. It is written
whole to a temporary name and renamed, for its owner's eyes only.

Files go when they are too old, or when their owner has too many: the oldest of that owner, never one of a session that is
open here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rekindle.errors import SessionError

VERSION = 1
_SUFFIXES = (".json", ".tmp")  # the latter of a process that was ended while it wrote


class SavedSessions:
    """A folder of sessions, or nothing where there is no folder."""

    def __init__(
        self,
        folder: Path | None,
        fingerprint: bytes,
        *,
        max_files: int,
        ttl_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """At most `max_files` of one owner, none older than `ttl_seconds`; the clock is that of files' times."""
        self._folder = folder
        self._fingerprint = fingerprint.hex()
        self._max_files, self._ttl_seconds, self._clock = max_files, ttl_seconds, clock

    @property
    def is_kept(self) -> bool:
        """Whether anything outlives the process."""
        return self._folder is not None

    def _path(self, salt: bytes, key: str) -> Path:
        assert self._folder is not None
        owner = blake2b(salt, digest_size=16, person=b"rekindle owner").hexdigest()
        session = blake2b(key.encode(), digest_size=16, person=b"rekindle live").hexdigest()
        return self._folder / owner / f"{session}.json"

    def write(self, salt: bytes, key: str, content: dict[str, Any]) -> None:
        """In place of what was written before. Raises OSError."""
        if self._folder is None:
            return
        path = self._path(salt, key)
        for folder in (self._folder, path.parent):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_suffix(f".{os.urandom(8).hex()}.tmp")  # two servers may write one session at once
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"version": VERSION, "fingerprint": self._fingerprint} | content, file)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def read(self, salt: bytes, key: str) -> dict[str, Any]:
        """What was written for this key. Raises SessionError if there is nothing, or nothing that fits."""
        try:
            content = json.loads(self._path(salt, key).read_text("utf-8")) if self._folder is not None else None
        except FileNotFoundError:
            content = None
        except (OSError, ValueError) as error:
            raise unreadable(error) from None
        if not isinstance(content, dict):
            raise SessionError("there is no session of this handle; it may have been on another server")
        if (content.get("version"), content.get("fingerprint")) != (VERSION, self._fingerprint):
            raise SessionError("the session was had with another model or other settings; begin a new one")
        return content

    def delete(self, salt: bytes, key: str) -> None:
        """Forget it, if it is there. Raises OSError."""
        if self._folder is not None:
            self._path(salt, key).unlink(missing_ok=True)

    def prune(self, kept: Iterable[tuple[bytes, str]], owner: bytes | None = None) -> int:
        """Delete what is too old or too much, of one owner or of all, but not those kept, as (salt, key); says how many."""
        if self._folder is None:
            return 0
        spared, num_deleted = {self._path(salt, key) for salt, key in kept}, 0
        owners = _entries(self._folder) if owner is None else [self._path(owner, "").parent]
        for owner_folder in owners:
            files = sorted(
                ((_changed(path), path) for path in _entries(owner_folder) if path.suffix in _SUFFIXES), reverse=True
            )
            for number, (changed, path) in enumerate(files):
                is_old = changed < self._clock() - self._ttl_seconds
                if path not in spared and (is_old or number >= self._max_files):
                    with suppress(OSError):  # somebody else was faster, or it is not ours to delete
                        path.unlink()
                        num_deleted += 1
        return num_deleted


def unreadable(error: Exception) -> SessionError:
    return SessionError(f"the saved session can't be read ({type(error).__name__}); begin a new one")


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except OSError:
        return []


def _changed(path: Path) -> float:
    """When it was written last; 0.0 if it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
