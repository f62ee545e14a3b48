"""What is remembered of chunks, beyond the end of the process.

    <store's folder>/v1/scores/<fingerprint>/<chunk key>        one chunk's scores, averaged over its meetings

A file appears whole or not at all, so processes may share the folder; of two that have met a chunk at the same time, the
last one's average stays. A file that is torn, foreign or of another length than its chunk is as good as none. Without a
folder everything is forgotten at the end.

Look-ups in a request's way ask the memory alone. Files are read where blocks are fetched.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np

from rekindle.kv.folder import Folder
from rekindle.kv.keys import Key, digest, token_bytes
from rekindle.reuse.blend import Memory
from rekindle.reuse.blend_select import Floats
from rekindle.tokens import Tokens

_log = logging.getLogger(__name__)
_MAGIC = b"rekindle scores\n"
_HEAD = struct.Struct("<16s16sII")  # magic, checksum of what follows it, meetings, tokens
MAX_FILES = 10_000  # of one model, and a tenth more until they are counted again; the oldest go


class Scores:
    """A memory of chunks with files behind it. Thread-safe."""

    def __init__(self, fingerprint: bytes, head: Tokens, store_folder: Path | None = None) -> None:
        """`head`: what stands before chunks on their own; another head, other scores."""
        self._identity = digest(b"chunk", fingerprint, token_bytes(head))
        self._store = None if store_folder is None else Folder(store_folder)
        self._folder = None if self._store is None else self._store.scores / fingerprint.hex()
        self._memory = Memory()
        self._lock = threading.Lock()
        self._num_written = 0  # since files were counted
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
        if self._folder is None or self.get(key) is not None:
            return
        with suppress(OSError):
            found = _decoded((self._folder / key.hex()).read_bytes(), length)
            if found is not None:
                with self._lock:
                    self._memory.put(key, *found)

    def add(self, key: Key, scores: Floats) -> None:
        """One more meeting."""
        with self._lock:
            self._memory.add(key, scores)
            count, mean = self._memory.meetings(key), self._memory.get(key)
        assert mean is not None
        if self._store is not None and self._folder is not None:
            try:
                self._store.write(self._folder / key.hex(), [_encoded(count, mean)], time.time_ns())
            except OSError as error:
                _log.warning("what was learned of a chunk could not be written: %s", error)
            self._num_written += 1
            if self._num_written > MAX_FILES // 10:
                self._remove_oldest()

    def clear(self) -> None:
        """Forget everything of this model."""
        with self._lock:
            self._memory = Memory()
        for path in self._files():
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        with suppress(OSError):
            return [] if self._folder is None else list(self._folder.iterdir())
        return []

    def _remove_oldest(self) -> None:
        files, self._num_written = self._files(), 0
        if len(files) > MAX_FILES:
            with suppress(OSError):
                for path in sorted(files, key=lambda path: path.stat().st_mtime_ns)[:-MAX_FILES]:
                    path.unlink(missing_ok=True)


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
