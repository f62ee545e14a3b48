"""What is remembered of chunks, beyond the end of the process.

    <store's folder>/v1/scores/<fingerprint>/<chunk key>        one chunk's scores, averaged over its meetings

A file appears whole or not at all, so processes may share the folder; of two that have met a chunk at the same time, the
last one's average stays. A file that is torn, foreign or of another length than its chunk is as good as none. Without a
folder everything is forgotten at the end.

Look-ups in a request's way ask the memory alone. Files are read where blocks are fetched.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from contextlib import suppress
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

import numpy as np

from rekindle.kv.format import VERSION
from rekindle.kv.keys import Key, digest, token_bytes
from rekindle.reuse.blend import Memory
from rekindle.reuse.blend_select import Floats
from rekindle.tokens import Tokens

_log = logging.getLogger(__name__)
_MAGIC = b"rekindle scores\n"
_HEAD = struct.Struct("<16s16sII")  # magic, checksum of what follows it, meetings, tokens
_FOLDER_MODE, _FILE_MODE = 0o700, 0o600
MAX_FILES = 10_000  # of one model; counted when the folder is opened, the oldest go


class Scores:
    """A memory of chunks with files behind it. Thread-safe."""

    def __init__(self, fingerprint: bytes, head: Tokens, store_folder: Path | None = None) -> None:
        """`head`: what stands before chunks on their own; another head, other scores."""
        self._identity = digest(b"chunk", fingerprint, token_bytes(head))
        parts = (f"v{VERSION}", "scores", fingerprint.hex())
        self._folders = [] if store_folder is None else list(accumulate(parts, Path.joinpath, initial=store_folder))
        self._memory = Memory()
        self._lock = threading.Lock()
        self._remove_oldest()

    def key(self, chunk: Tokens, salt: bytes) -> Key:
        """Names a chunk's tokens, for one tenant."""
        return digest(self._identity, salt, token_bytes(chunk))

    def get(self, key: Key) -> Floats | None:
        """Scores in memory."""
        with self._lock:
            return self._memory.get(key)

    def fetch(self, key: Key, length: int) -> None:
        """Bring what a file has of a chunk of this length into memory, if it is not there."""
        if not self._folders or self.get(key) is not None:
            return
        with suppress(OSError):
            found = _decoded((self._folders[-1] / key.hex()).read_bytes(), length)
            if found is not None:
                with self._lock:
                    self._memory.put(key, *found)

    def add(self, key: Key, scores: Floats) -> None:
        """One more meeting."""
        with self._lock:
            self._memory.add(key, scores)
            count, mean = self._memory.meetings(key), self._memory.get(key)
        assert mean is not None
        if self._folders:
            try:
                self._write(self._folders[-1] / key.hex(), _encoded(count, mean))
            except OSError as error:
                _log.warning("what was learned of a chunk could not be written: %s", error)

    def clear(self) -> None:
        """Forget everything of this model."""
        with self._lock:
            self._memory = Memory()
        for path in self._files():
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        with suppress(OSError):
            return list(self._folders[-1].iterdir()) if self._folders else []
        return []

    def _remove_oldest(self) -> None:
        files = self._files()
        if len(files) > MAX_FILES:
            with suppress(OSError):
                for path in sorted(files, key=lambda path: path.stat().st_mtime_ns)[:-MAX_FILES]:
                    path.unlink(missing_ok=True)

    def _write(self, path: Path, data: bytes) -> None:
        self._folders[0].parent.mkdir(parents=True, exist_ok=True)
        for folder in self._folders:
            folder.mkdir(_FOLDER_MODE, exist_ok=True)
        temporary = path.with_name(f".{os.urandom(8).hex()}.writing")
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE), "wb") as file:
                file.write(data)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _encoded(count: int, scores: Floats) -> bytes:
    body = scores.astype("<f4").tobytes()
    rest = struct.pack("<II", count, len(scores)) + body
    return _HEAD.pack(_MAGIC, blake2b(rest, digest_size=16).digest(), count, len(scores)) + body


def _decoded(data: bytes, length: int) -> tuple[int, Floats] | None:
    """(meetings, scores) of a whole file of a chunk of this length."""
    if len(data) != _HEAD.size + 4 * length:
        return None
    magic, checksum, count, tokens = _HEAD.unpack_from(data)
    is_whole = magic == _MAGIC and checksum == blake2b(data[32:], digest_size=16).digest()
    if not is_whole or tokens != length or not count:
        return None
    return count, np.frombuffer(data, "<f4", length, _HEAD.size).astype(np.float32)
