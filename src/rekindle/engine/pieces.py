"""What a payload of the llama.cpp engine is made of: saved states, one behind the other, with a few numbers before each.

    │ first token, tokens, bytes │ state │ first token, tokens, bytes │ state │ …

One state is enough unless the model has sliding windows, see the engine. Payloads that follow each other can be joined into
fewer, which load faster where they are small; the joined ones lie in memory that is used again for the next.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from rekindle.engine.protocol import Payload
from rekindle.engine.saved_join import MAX_JOINED_BYTES, MAX_STATE_BYTES, join
from rekindle.errors import ForeignPayload

PIECE = struct.Struct("<III")  # first index, tokens, bytes


def unpack(payload: Payload) -> list[tuple[int, int, memoryview]]:
    """Pieces as (offset from the payload's first token, tokens, bytes). Raises ForeignPayload."""
    data, pieces, offset, index = memoryview(payload.data), [], 0, 0
    while offset + PIECE.size <= len(data):
        start, count, size = PIECE.unpack_from(data, offset)
        offset += PIECE.size
        pieces.append((start - payload.position, count, data[offset : offset + size]))
        if start != payload.position + index or count == 0:
            break
        offset += size
        index += count
    if offset != len(data) or index != len(payload):
        raise ForeignPayload(f"the payload is torn: {len(data)} bytes do not hold {len(payload)} tokens")
    return pieces


class Joiner:
    """Joins an engine's small payloads. Not thread-safe."""

    def __init__(self, fingerprint: bytes) -> None:
        self._fingerprint = fingerprint
        self._room = np.empty(0, np.uint8)

    def joined(self, payloads: Iterable[Payload]) -> Iterator[Payload]:
        """The same KV in the same order, in payloads of which each is valid until the next. Raises ForeignPayload."""
        group: list[Payload] = []
        for payload in payloads:
            if group and not self._goes_with(group, payload):
                yield from self._join(group)
                group = []
            group.append(payload)
        yield from self._join(group)

    def _goes_with(self, group: Sequence[Payload], payload: Payload) -> bool:
        last, size = group[-1], len(payload.data)
        return (
            size == len(last.data)
            and payload.position == last.position + len(last)
            and payload.fingerprint == last.fingerprint == self._fingerprint
            and size <= MAX_STATE_BYTES
            and (len(group) + 1) * size <= MAX_JOINED_BYTES
        )

    def _join(self, group: Sequence[Payload]) -> Iterator[Payload]:
        joined = self._as_one(group) if len(group) > 1 else None
        if joined is None:
            yield from group
        else:
            yield joined

    def _as_one(self, group: Sequence[Payload]) -> Payload | None:
        """None if they can't be joined."""
        pieces = [unpack(payload) for payload in group]
        if any(len(each) > 1 for each in pieces):
            return None
        if not len(self._room):
            self._room = np.empty(PIECE.size + MAX_JOINED_BYTES, np.uint8)
        size = join([data for ((_, _, data),) in pieces], self._room[PIECE.size :])
        if size is None:
            return None
        tokens = np.concatenate([payload.tokens for payload in group])
        PIECE.pack_into(self._room.data, 0, group[0].position, len(tokens), size)
        return Payload(tokens, group[0].position, self._room[: PIECE.size + size].data, self._fingerprint)
