"""What KV depends on, as one digest.

llama.cpp checks a loaded state for layer count, types and row sizes only; that two models of one shape are not confused is
ours to ensure. The weights' digest takes a second per gigabyte, so it is remembered beside what tells that a file is still
the same: path, size and times. The change time counts too, because the modification time can be set back; and a file
that has just changed is not trusted yet, because it could change again within the clock's resolution.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import platformdirs

from rekindle.errors import ModelError
from rekindle.model.source import parts

_SETTLED_NS = 2_000_000_000  # the coarsest file times in use are two seconds apart
_DIGEST_BYTES = 16


def cache_folder() -> Path:
    """Where Rekindle keeps what it can make again."""
    return Path(platformdirs.user_cache_dir("rekindle"))


def weights_digest(path: Path, folder: Path | None = None) -> bytes:
    """Digest of a model's weights, 16 bytes, all parts of a split one; computed once for each state of the files.

    Raises ModelError.
    """
    return files_digest(weights_files(path), folder)


def weights_files(path: Path) -> list[Path]:
    """All parts of a model, itself if it is not split."""
    return [path.with_name(part) for part in parts(path.name)]


def files_digest(files: Sequence[Path], folder: Path | None = None) -> bytes:
    """The same of any files that are a model's weights, in this order. Raises ModelError."""
    digests = [_file_digest(file, folder or cache_folder() / "digests") for file in files]
    return digests[0] if len(digests) == 1 else _digest(b"".join(digests))


def _file_digest(path: Path, folder: Path) -> bytes:
    try:
        now, identity = time.time_ns(), _identity(path)
        note = _note(folder, identity)
        known = _read(note, identity)
        if known is None:
            with path.open("rb") as file:
                known = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)).digest()
            if now - max(identity[2:]) > _SETTLED_NS:
                _write(note, identity, known)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    return known


def _identity(path: Path) -> list[Any]:
    """What tells that a file is still the same: path, size, and the times of change in nanoseconds."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _note(folder: Path, identity: list[Any]) -> Path:
    return folder / f"{_digest(json.dumps(identity).encode()).hex()}.json"


class FileStates:
    """Files as they were when this was made, and digests of what became of them when they were loaded.

    Made before they are loaded, and looked at again afterwards: what was loaded of files that changed meanwhile is nobody's
    but its own, and where that has no digest of its own it is refused.
    """

    def __init__(self, files: Sequence[Path], folder: Path | None = None) -> None:
        """Raises ModelError."""
        self._files, self._folder = files, folder or cache_folder() / "digests"
        now = time.time_ns()
        self._identities = [_identity(path) for path in files]
        self._settled = all(now - max(identity[2:]) > _SETTLED_NS for identity in self._identities)

    def weights_digest(self) -> bytes:
        """Digest of what is in the files, 16 bytes, which is what was loaded. Raises ModelError if they have changed."""
        digest = files_digest(self._files, self._folder)
        for path, before in zip(self._files, self._identities, strict=True):
            if _identity(path) != before:
                raise ModelError(f"{path} has changed since it was loaded; load it again")
        return digest

    def digest(self, facts: Mapping[str, object], make: Callable[[], bytes]) -> bytes:
        """What `make` returns, 16 bytes, made once for each state of the files and these facts of how they were loaded."""
        if [_identity(path) for path in self._files] != self._identities:
            return make()
        identity = [*self._identities, [json.dumps(facts, sort_keys=True)]]
        note = _note(self._folder, identity)
        known = _read(note, identity)
        if known is None:
            known = make()
            if self._settled:
                _write(note, identity, known)
        return known


def fingerprint(facts: Mapping[str, object]) -> bytes:
    """Digest of everything that KV's meaning depends on, 16 bytes. Order of the facts doesn't matter."""
    return _digest(json.dumps(facts, sort_keys=True, default=str).encode())


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _read(note: Path, identity: list[Any]) -> bytes | None:
    try:
        content = json.loads(note.read_text("utf-8"))
        digest = bytes.fromhex(content["digest"])
        return digest if content["identity"] == identity and len(digest) == _DIGEST_BYTES else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(note: Path, identity: list[Any], digest: bytes) -> None:
    """Best effort: without a writable cache folder the digest is computed at each start."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{os.getpid()}.{id(note)}.tmp")
        temporary.write_text(json.dumps({"identity": identity, "digest": digest.hex()}), "utf-8")
        temporary.replace(note)
    except OSError:
        return
