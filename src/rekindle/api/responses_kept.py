"""Responses that are kept, so that others can go on from them.

A response is known by its id to whoever has the salt that it was made under, and to nobody else: to all others there is
none. The number is bounded, and so is the age; for one too many, what was used least recently goes, of the API key that
has most, so that nobody's conversations end because somebody else has many. Nothing here is KV: that is where it always
is, in the engine and in the store, and is found again because the conversation's tokens are what they were.

Belongs to the event loop.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rekindle.api.keys import owner_of
from rekindle.api.responses_items import Message
from rekindle.errors import InvalidRequest
from rekindle.reuse.prompt import Prompt

_SHOWN = 80  # characters of an id in messages


class UnknownResponse(InvalidRequest):
    """There is no such response, or none any more."""

    status = 404
    code = "not_found"


class UnknownPrevious(InvalidRequest):
    """There is nothing to go on from. OpenAI refuses this with 400."""

    code = "previous_response_not_found"


@dataclass(frozen=True, eq=False)
class Kept:
    """One response."""

    body: dict[str, Any]  # as it was sent
    items: list[dict[str, Any]]  # the input of its request
    conversation: list[Message]  # all messages up to and with its answer, without instructions
    prompt: Prompt | None = None  # what was read
    answer: tuple[int, ...] = ()  # what was generated


class KeptResponses:
    """A bounded number of responses."""

    def __init__(self, max_entries: int, max_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max, self._seconds, self._clock = max_entries, max_seconds, clock
        self._entries: OrderedDict[tuple[bytes, str], tuple[float, Kept]] = OrderedDict()  # used least recently first

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, salt: bytes, kept: Kept) -> None:
        """Keep a response; one that was used least recently makes room."""
        now = self._clock()
        for key in [key for key, (since, _) in self._entries.items() if now - since > self._seconds]:
            del self._entries[key]
        self._entries[salt, kept.body["id"]] = (now, kept)
        while len(self._entries) > self._max:
            owners = Counter(owner_of(owner) for owner, _ in self._entries)
            most = max(owners.values())
            del self._entries[next(key for key in self._entries if owners[owner_of(key[0])] == most)]

    def find(self, salt: bytes, response_id: str) -> Kept | None:
        """The response of this id, if it was made under this salt and is not too old."""
        since, kept = self._entries.get((salt, response_id), (0.0, None))
        if kept is None:
            return None
        if self._clock() - since > self._seconds:
            del self._entries[salt, response_id]
            return None
        self._entries.move_to_end((salt, response_id))
        return kept

    def get(self, salt: bytes, response_id: str) -> Kept:
        """Raises UnknownResponse."""
        kept = self.find(salt, response_id)
        if kept is None:
            raise UnknownResponse(f"there is no response {response_id[:_SHOWN]!r} here", param="response_id")
        return kept

    def delete(self, salt: bytes, response_id: str) -> None:
        """Forget it. Raises UnknownResponse."""
        self.get(salt, response_id)
        del self._entries[salt, response_id]


def previous(salt: bytes, response_id: str, *places: KeptResponses) -> Kept:
    """What to go on from, in the first place that has it. Raises UnknownPrevious."""
    for place in places:
        if (kept := place.find(salt, response_id)) is not None:
            return kept
    raise UnknownPrevious(
        f"there is no response {response_id[:_SHOWN]!r} to go on from; it may have been deleted, never stored, or too old: "
        "send the whole conversation as input",
        param="previous_response_id",
    )
