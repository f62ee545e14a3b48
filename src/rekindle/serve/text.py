"""From token bytes to text that can be sent: whole characters, and nothing of a stop string."""

from __future__ import annotations

import codecs


class TextStream:
    """A codec with `add` and `flush`. What may still become a stop string is held back."""

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = stop
        self._held = ""
        self.stopped = False  # a stop string was met; nothing follows

    def add(self, piece: bytes) -> str:
        """The text that is certain after these bytes."""
        if self.stopped:
            return ""
        self._held += self._utf8.decode(piece)
        return self._release(self._certain())

    def flush(self) -> str:
        """The rest, at the end of the answer."""
        if self.stopped:
            return ""
        self._held += self._utf8.decode(b"", final=True)
        self._certain()
        return self._release(len(self._held))

    def _certain(self) -> int:
        """How many held characters may go out; cuts at the first stop string."""
        found = [index for index in (self._held.find(text) for text in self._stop) if index >= 0]
        if found:
            self._held = self._held[: min(found)]
            self.stopped = True
            return len(self._held)
        return len(self._held) - max((_overlap(self._held, text) for text in self._stop), default=0)

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
