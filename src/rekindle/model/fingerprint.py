"""What KV depends on, as one digest.

llama.cpp checks a loaded state for layer count, types and row sizes only; that two models of one shape are not confused is
ours to ensure. The weights' digest takes a second per gigabyte, so it is remembered beside the file's size and time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import platformdirs

from rekindle.errors import ModelError


def cache_folder() -> Path:
    """Where Rekindle keeps what it can make again."""
    return Path(platformdirs.user_cache_dir("rekindle"))


def weights_digest(path: Path, folder: Path | None = None) -> bytes:
    """Digest of a file's content, 16 bytes, computed once per (path, size, modification time). Raises ModelError."""
    try:
        stat = path.stat()
        identity = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
        note = (folder or cache_folder() / "digests") / f"{_digest(json.dumps(identity).encode()).hex()}.json"
        known = _read(note, identity)
        if known is None:
            with path.open("rb") as file:
                known = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
            _write(note, identity, known)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    return known


def fingerprint(facts: Mapping[str, object]) -> bytes:
    """Digest of everything that KV's meaning depends on, 16 bytes. Order of the facts doesn't matter."""
    return _digest(json.dumps(facts, sort_keys=True, default=str).encode())


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _read(note: Path, identity: list[object]) -> bytes | None:
    try:
        content = json.loads(note.read_text("utf-8"))
        return bytes.fromhex(content["digest"]) if content["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(note: Path, identity: list[object], digest: bytes) -> None:
    """Best effort: without a writable cache folder the digest is computed at each start."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{id(note)}.tmp")
        temporary.write_text(json.dumps({"identity": identity, "digest": digest.hex()}), "utf-8")
        temporary.replace(note)
    except OSError:
        return
